"""What passes relevance back through operations that are no layers, as autograd functions on c = R / activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "depends_on",
    "group_norm",
    "instance_norm",
    "is_gate",
    "is_view_of",
    "layer_norm",
    "scale_relevance",
    "slope",
]

_GATES = {"_GateBackward", "RsqrtBackward0", "ReciprocalBackward0"}
_SIGNS = {"_SignBackward", "ErfBackward0"}
_VIEWS = {
    f"{each}Backward0"
    for each in (
        "View", "UnsafeView", "ReshapeAlias", "Expand", "Unsqueeze", "Squeeze", "Transpose", "T", "Permute", "Clone",
        "Select", "Slice", "Alias", "ToCopy", "Split", "Unbind", "MaskedFill",
    )
} | {"SqueezeBackward1", "SqueezeBackward2", "ViewBackward1"}  # fmt: skip
_SHIFTS = {"AddBackward0", "SubBackward0", "RsubBackward1"}  # where one operand is a constant
_SCALES = {"MulBackward0", "DivBackward0", "NegBackward0"}
_COPIES = {name.rstrip("0123456789") for name in _VIEWS} | {
    f"{each}Backward"
    for each in (
        "ConstantPadNd", "ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D", "ReplicationPad1D",
        "ReplicationPad2D", "ReplicationPad3D", "Cat", "Index", "IndexSelect", "Roll", "Flip", "Stack",
        "AsStrided", "Copy",
    )
} | {"CopySlices"}  # fmt: skip


def slope(
    z: Tensor,
    function: Callable[[Tensor], Tensor],
    *,
    inplace: bool = False,
    gate: Literal["", "gate", "sign"] = "",
) -> Tensor:
    """y = f(z) that passes the secant f(z) / z back: R_z = R_y, the share of a neuron that has one input.

    At z = 0, where R is 0 in any case, it is 0.5 for f(0) = 0 and 0 otherwise.

    Args:
        z: Any shape.
        function: Elementwise, out of place.
        inplace: Whether `z` itself is overwritten with the result.
        gate: "gate" if y gates what it is multiplied with, "sign" if y plus a constant does, see `is_gate`.
    """
    result: Tensor = _SLOPES[gate].apply(z, function, inplace)
    return result


def is_gate(x: Tensor, *, softmax: bool = False) -> bool:
    """Whether x comes straight from a gate (sigmoid, hardsigmoid) or a normalizer (rsqrt, reciprocal, negative power).

    Constants may have been added or multiplied; tanh and erf count with a constant added, as in handwritten GELUs.

    Args:
        x: Any tensor.
        softmax: Whether attention weights count, too.
    """
    node, shifted = _source(x)
    name = type(node).__name__
    if name == "PowBackward0":
        return bool(node._saved_exponent < 0)
    return name in _GATES or (shifted and name in _SIGNS) or (softmax and name == "SoftmaxBackward0")


def is_view_of(x: Tensor, leaves: Mapping[int, Any]) -> bool:
    """Whether x is one of some leaf tensors, given by id, or comes straight from one."""
    return id(x) in leaves or id(getattr(_source(x)[0], "variable", None)) in leaves


def _source(x: Tensor) -> tuple[Any, bool]:
    """The operation that x is a view of, with constants added or multiplied; and whether any was added."""
    node: Any = x.grad_fn
    shifted = False
    while node is not None:
        name = type(node).__name__
        if name in _SHIFTS or name in _SCALES:
            active = [each for each, _ in node.next_functions if each is not None]
            if len(active) != 1:
                break
            shifted |= name in _SHIFTS
            node = active[0]
        elif name in _VIEWS:
            node = node.next_functions[0][0]
        else:
            break
    return node, shifted


def scale_relevance(x: Tensor, factor: float) -> Tensor:
    """x itself, whose relevance is `factor` of what arrives."""
    result: Tensor = _Scale.apply(x, factor)
    return result


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm whose standard deviation is taken as a constant (Ali et al. 2022, eq. 8): what is left is linear."""
    result: Tensor = _LayerNorm.apply(input, list(normalized_shape), weight, bias, eps)
    return result


def depends_on(x: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Whether autograd leads from x to one of some leaf tensors."""
    wanted = {id(leaf) for leaf in leaves}
    if id(x) in wanted:
        return True
    waiting, seen = [x.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        waiting += [each for each, _ in node.next_functions]
    return False


def is_copy(x: Tensor) -> bool:
    """Whether x is a leaf tensor, or holds nothing but copies of the values of one (and of constants)."""
    waiting = [x.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and not hasattr(node, "variable"):
            if type(node).__name__.rstrip("0123456789") not in _COPIES:
                return False
            waiting += [each for each, _ in node.next_functions]
    return True


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, function: Callable[[Tensor], Tensor], inplace: bool) -> Tensor:
        y = function(z)
        ratio = y / z
        ctx.save_for_backward(ratio.nan_to_num_(nan=0.5, posinf=0.0, neginf=0.0))
        if not inplace:
            return y
        ctx.mark_dirty(z)
        return z.copy_(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return gradients[0] * ratio, None, None


class _Gate(_Slope):
    pass


class _Sign(_Slope):
    pass


_SLOPES = {"": _Slope, "gate": _Gate, "sign": _Sign}


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, _, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.axes = tuple(range(-len(shape), 0))
        ctx.save_for_backward(rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        rstd, weight = ctx.saved_tensors
        scaled = gradients[0] * rstd if weight is None else (gradients[0] * weight).mul_(rstd)
        return scaled - scaled.mean(ctx.axes, keepdim=True), None, None, None, None


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """GroupNorm of [N, C, ...] whose standard deviation is taken as a constant, as in `layer_norm`."""
    grouped = input.reshape(input.shape[0], num_groups, -1)
    return _affine(_standardized(grouped, (2,), eps).view_as(input), weight, bias)


def instance_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, batch: bool = False
) -> Tensor:
    """InstanceNorm of [N, C, ...] or, over the `batch`, BatchNorm by its statistics, with the deviation a constant."""
    axes = tuple(range(2, x.dim()))
    return _affine(_standardized(x, (0, *axes) if batch else axes, eps), weight, bias)


def _standardized(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * (centred.detach().square().mean(axes, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)
