"""LRP: every operation of a forward pass that needs more than its ordinary gradient is met here.

| operation | what passes c = R / activation back |
|---|---|
| Linear, convolutions | the rule of the layer: epsilon, or what a composite says |
| ReLU family, pooling, sums, views, BatchNorm in evaluation mode | the ordinary gradient |
| GELU, SiLU, Hardswish, ReLU6, sigmoid and the like | the secant f(z) / z |
| LayerNorm, GroupNorm, InstanceNorm, RMSNorm, normalize | the gradient with the standard deviation (norm) held |
| product, quotient, matrix product of activations | a gate or normalizer gets nothing, otherwise half to each factor |
| attention | see `attention.attend` |
| all else (softmax, powers, recurrent layers) | the ordinary gradient |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_xai_compress.relevance.attention import attend
from lightning_xai_compress.relevance.interception import BATCH_NORM, Interception
from lightning_xai_compress.relevance.propagation import (
    group_norm,
    instance_norm,
    is_gate,
    is_view_of,
    layer_norm,
    scale_relevance,
    slope,
)

__all__ = ["ELEMENTWISE", "LRP", "out_of_place"]

# functions that pass the secant, with the position of their `inplace` argument
_SECANT: dict[Any, int | None] = {
    F.gelu: None,
    F.softplus: None,
    F.logsigmoid: None,
    F.softsign: None,
    F.tanhshrink: None,
    F.softshrink: None,
    F.hardshrink: None,
    F.silu: 1,
    F.mish: 1,
    F.hardswish: 1,
    F.relu6: 1,
    torch.selu: None,
    F.selu: 1,
    F.elu: 2,
    torch.celu: None,
    F.celu: 2,
    F.hardtanh: 3,
}
_SIGNS: dict[Any, int | None] = dict.fromkeys([torch.tanh, Tensor.tanh, F.tanh])
_GATES: dict[Any, int | None] = {
    **dict.fromkeys([torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.special.expit]),
    F.hardsigmoid: 1,
}
_INPLACE = {
    torch.tanh_: torch.tanh,
    Tensor.tanh_: torch.tanh,
    torch.sigmoid_: torch.sigmoid,
    Tensor.sigmoid_: torch.sigmoid,
    F.elu_: F.elu,
    torch.selu_: torch.selu,
    torch.celu_: torch.celu,
    F.hardtanh_: F.hardtanh,
    torch.relu_: torch.relu,
    Tensor.relu_: torch.relu,
    F.leaky_relu_: F.leaky_relu,
}
# every elementwise function that is not piecewise linear through the origin, with the position of `inplace`
ELEMENTWISE: dict[Any, int | None] = {
    **_SECANT,
    **_SIGNS,
    **_GATES,
    **dict.fromkeys(
        [torch.tanh_, Tensor.tanh_, torch.sigmoid_, Tensor.sigmoid_, F.elu_, torch.selu_, torch.celu_, F.hardtanh_]
    ),
}
_RECTIFIER_INPLACE = {F.relu: 1, F.leaky_relu: 2, F.threshold: 3}
_RELU_INPLACE = {torch.relu_, Tensor.relu_, F.relu_}
_PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
_PRODUCTS_INPLACE = {Tensor.mul_, Tensor.multiply_, Tensor.__imul__}
_QUOTIENTS = {
    torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__,
    Tensor.div_, Tensor.divide_, Tensor.__itruediv__,
}  # fmt: skip
_MATRIX_PRODUCTS = {
    torch.matmul, torch.bmm, torch.mm, torch.inner, torch.outer, torch.linalg.matmul,
    Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.inner, Tensor.outer, Tensor.__matmul__,
}  # fmt: skip
_ADDED_PRODUCTS = {
    torch.addmm, torch.baddbmm, torch.addcmul, Tensor.addmm, Tensor.baddbmm, Tensor.addcmul,
}  # fmt: skip
_INSTANCE_NORM = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")


class LRP(Interception):
    """Layer-wise Relevance Propagation, see `Interception` for the arguments."""

    handlers: ClassVar[dict[Any, str]] = {
        **Interception.handlers,
        **dict.fromkeys(ELEMENTWISE, "_secant"),
        **dict.fromkeys([*_RELU_INPLACE, F.relu], "_relu"),
        **dict.fromkeys(_PRODUCTS, "_product"),
        **dict.fromkeys(_PRODUCTS_INPLACE, "_product_inplace"),
        **dict.fromkeys(_QUOTIENTS, "_quotient"),
        **dict.fromkeys(_MATRIX_PRODUCTS, "_matrix_product"),
        **dict.fromkeys(_ADDED_PRODUCTS, "_added_product"),
        torch.einsum: "_einsum",
        F.layer_norm: "_layer_norm",
        F.group_norm: "_group_norm",
        F.instance_norm: "_instance_norm",
        F.rms_norm: "_rms_norm",
        F.normalize: "_normalize",
        F.glu: "_glu",
        F.scaled_dot_product_attention: "_attend",
    }

    def _relu(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        known = self._outputs.get(id(input))
        result: Tensor = func(input, *args, **kwargs)
        inplace = func in _RELU_INPLACE or kwargs.get("inplace", args[0] if args else False)
        if inplace and known is not None and known.tensor is input and known.kept is not None:
            known.kept.allow()
        return result

    def _secant(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not input.requires_grad:
            result: Tensor = func(input, *args, **kwargs)
            return result
        function, inplace = out_of_place(func, args, kwargs)
        func = _INPLACE.get(func, func)
        return slope(
            input, function, inplace=inplace, gate="gate" if func in _GATES else "sign" if func in _SIGNS else ""
        )

    def _factors(self, first: Any, second: Any) -> tuple[Any, Any]:
        """Two factors of a product with the shares that they get."""
        if not (_is_activation(first) and _is_activation(second)):
            return first, second
        if is_view_of(first, self._names) or is_view_of(second, self._names):
            return first, second
        softmax = self.settings.attention == "cp"
        if is_gate(second, softmax=softmax):
            return first, second.detach()
        if is_gate(first, softmax=softmax):
            return first.detach(), second
        return scale_relevance(first, 0.5), scale_relevance(second, 0.5)

    def _product(self, func: Any, input: Any, other: Any, **kwargs: Any) -> Any:
        return func(*self._factors(input, other), **kwargs)

    def _product_inplace(self, func: Any, input: Tensor, other: Any) -> Tensor:
        if not (_is_activation(input) and _is_activation(other)):
            result: Tensor = func(input, other)
            return result
        first, second = self._factors(input.clone(), other)
        return input.copy_(first * second)

    def _quotient(self, func: Any, input: Any, other: Any, **kwargs: Any) -> Any:
        if _is_activation(input) and _is_activation(other):
            other = other.detach()
        return func(input, other, **kwargs)

    def _matrix_product(self, func: Any, input: Tensor, other: Tensor, **kwargs: Any) -> Any:
        return func(*self._factors(input, other), **kwargs)

    def _added_product(self, func: Any, input: Tensor, first: Tensor, second: Tensor, **kwargs: Any) -> Any:
        return func(input, *self._factors(first, second), **kwargs)

    def _einsum(self, func: Any, equation: str, *operands: Any) -> Any:
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        active = [each for each in operands if _is_activation(each) and not is_view_of(each, self._names)]
        if len(active) == 2 and len(operands) == 2:
            operands = self._factors(*operands)
        elif len(active) > 1:
            operands = tuple(
                scale_relevance(each, 1 / len(active)) if any(each is one for one in active) else each
                for each in operands
            )
        return func(equation, *operands)

    def _glu(self, func: Any, input: Tensor, dim: int = -1) -> Tensor:
        signal, gate = input.chunk(2, dim)
        return signal * gate.sigmoid().detach()

    def _layer_norm(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        return layer_norm(*args, **kwargs)

    def _group_norm(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        return group_norm(*args, **kwargs)

    def _batch_statistics(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        settings = dict(zip(BATCH_NORM, args, strict=False)) | kwargs
        return instance_norm(input, settings.get("weight"), settings.get("bias"), settings.get("eps", 1e-5), batch=True)

    def _instance_norm(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        settings = dict(zip(_INSTANCE_NORM, args, strict=False)) | kwargs
        if not settings.get("use_input_stats", True):
            result: Tensor = func(input, *args, **kwargs)
            return result
        return instance_norm(input, settings.get("weight"), settings.get("bias"), settings.get("eps", 1e-5))

    def _rms_norm(
        self, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        axes = tuple(range(-len(normalized_shape), 0))
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        y: Tensor = input * (input.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
        return y if weight is None else y * weight

    def _normalize(
        self, func: Any, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
    ) -> Tensor:
        norm: Tensor = input.detach().norm(p, dim, keepdim=True)
        return input / norm.clamp_min(eps)

    def _attend(self, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attend(self.settings.attention, query, key, value, *args, **kwargs)


def out_of_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], bool]:
    """A call of an elementwise function without its input, out of place; and whether it was in place."""
    inplace = func in _INPLACE or getattr(func, "__name__", "").endswith("_")
    function = _INPLACE.get(func, func)
    at = ELEMENTWISE.get(function, _RECTIFIER_INPLACE.get(function))
    if at is not None:
        inplace = inplace or bool(kwargs.get("inplace", args[at - 1] if len(args) >= at else False))
        args, kwargs = args[: at - 1], {key: value for key, value in kwargs.items() if key != "inplace"}
    return lambda z: function(z, *args, **kwargs), inplace


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
