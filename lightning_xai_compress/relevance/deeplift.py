"""DeepLIFT with the rescale rule (Shrikumar et al. 2017, sec. 3.5.1) as another way through the same engine.

A pass over a baseline is recorded first. Elementwise functions then pass the difference quotient
(f(x) - f(baseline)) / (x - baseline), max-pooling the differences at the maxima of both, everything else (products of
activations, too) its ordinary gradient, and the contribution of a weight is w times the weight gradient of
(x - baseline). Where the network is made of linear layers, elementwise functions and pooling, those of each layer sum
to f(x) - f(baseline).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.relevance.interception import Interception, without_autocast
from lightning_xai_compress.relevance.lrp import ELEMENTWISE, out_of_place
from lightning_xai_compress.relevance.operations import LINEAR_FUNCTIONS, Operation
from lightning_xai_compress.relevance.shares import add_squares
from lightning_xai_compress.relevance.statistics import RelevanceSums

__all__ = ["DeepLift", "Recording"]

_RECTIFIERS = {
    F.relu,
    torch.relu,
    Tensor.relu,
    torch.relu_,
    Tensor.relu_,
    F.relu_,
    F.leaky_relu,
    F.leaky_relu_,
    torch.prelu,
    F.rrelu,
    F.threshold,
}
# further elementwise functions, which models use by themselves
_NAMES = ("clamp", "clamp_min", "abs", "exp", "square", "sqrt", "log", "log1p", "erf", "pow")
_FURTHER = {getattr(place, name) for place in (torch, Tensor) for name in _NAMES} | {Tensor.__pow__}
_IN_PLACE = {
    getattr(place, f"{name}_"): getattr(place, name)
    for place in (torch, Tensor)
    for name in _NAMES
    if hasattr(place, f"{name}_")
}
_POOLS = {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d}
_RESCALED = ELEMENTWISE.keys() | _RECTIFIERS | _FURTHER | _IN_PLACE.keys()
_RECORDED = LINEAR_FUNCTIONS | _RESCALED | _POOLS
_SAME = 1e-10  # below it a difference quotient is the slope


class Recording(TorchFunctionMode):
    """Remembers input and output of every operation that needs its value at the baseline."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        input = args[0] if args else kwargs.get("input")
        if func not in _RECORDED or not _is_real(input):
            return without_autocast(func, *args, **kwargs)
        before = input.clone()
        output = without_autocast(func, *args, **kwargs)
        after = output.clone() if isinstance(output, Tensor) else output
        self.calls.append((func, before, after))
        return output


class DeepLift(Interception):
    """Like `Interception`, with the baseline's values at hand.

    Args:
        leaves, sums: As there.
    """

    handlers: ClassVar[dict[Any, str]] = {
        **dict.fromkeys(LINEAR_FUNCTIONS, "_layer"),
        **dict.fromkeys(_RESCALED, "_rescale"),
        **dict.fromkeys(_POOLS, "_pool"),
        F.batch_norm: "_batch_norm",
    }

    def __init__(self, leaves: Mapping[str, Tensor], sums: RelevanceSums) -> None:
        super().__init__(leaves, sums)
        self.baseline: list[tuple[Any, Tensor, Tensor]] = []
        self._at = 0

    def start(self, recording: Recording) -> None:
        """Take up the recorded pass of the next batch."""
        self.baseline = recording.calls

    def __enter__(self) -> DeepLift:
        self._at = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if error[0] is None and self._at < len(self.baseline):
            raise RelevanceError("the model calls fewer operations for the batch than for the baseline")

    def _next(self, func: Any, input: Tensor) -> tuple[Tensor, Tensor]:
        if self._at >= len(self.baseline):
            raise RelevanceError("the model calls more operations for the batch than for the baseline")
        recorded, before, after = self.baseline[self._at]
        self._at += 1
        if recorded is not func or before.shape != input.shape:
            raise RelevanceError("the model takes another path for the batch than for the baseline")
        return before, after

    def _layer(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        self._reference, _ = self._next(func, input)
        return super()._layer(func, input, weight, bias, *args, **kwargs)

    def _hook(
        self, call: Operation, kept: Any, epsilon: float, input: Tensor, weight: Tensor, name: str, rows: slice
    ) -> Callable[[Tensor], Tensor]:
        scored = name in self.sums.weights
        reference = self._reference

        def backward(gradient: Tensor) -> Tensor:
            if scored:
                difference = input - reference
                self._reached(name, rows, None, call.spatial)
                self.sums.add_relevance(name, rows, call.weight_gradient(difference, weight, gradient))
                add_squares(self.sums, name, rows, call, difference, weight, gradient)
            return gradient

        return backward

    def _rescale(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _is_real(input):  # indices, or a power of a number
            other: Tensor = func(input, *args, **kwargs)
            return other
        before, after = self._next(func, input)
        function, inplace = out_of_place(_IN_PLACE.get(func, func), args, kwargs)
        inplace = inplace or func in _IN_PLACE
        if not input.requires_grad:
            result: Tensor = func(input, *args, **kwargs)
            return result
        z = input.detach()
        change = z - before
        with torch.enable_grad():
            point = z.clone().requires_grad_()
            y = function(point)
            (slope,) = torch.autograd.grad(y.sum(), point)
        quotient = (y.detach() - after) / change
        quotient = torch.where(change.abs() < _SAME, slope, quotient)
        rescaled: Tensor = _Rescale.apply(input, y.detach(), quotient)
        return input.copy_(rescaled) if inplace else rescaled

    def _pool(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        before, after = self._next(func, input)
        if not input.requires_grad or not isinstance(after, Tensor):
            return func(input, *args, **kwargs)
        return _Pool.apply(input, before, lambda x: func(x, *args, **kwargs))


def _is_real(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, quotient: Tensor) -> Tensor:
        ctx.save_for_backward(quotient)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, baseline: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x, baseline)
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, baseline = (each.detach().clone().requires_grad_() for each in ctx.saved_tensors)
        (gradient,) = gradients
        with torch.enable_grad():
            y, y0 = ctx.function(x), ctx.function(baseline)
        largest = torch.maximum(y, y0).detach()
        (ordinary,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
        (above,) = torch.autograd.grad(y, x, gradient * (largest - y0.detach()))
        (below,) = torch.autograd.grad(y0, baseline, gradient * (y.detach() - largest))
        change = (x - baseline).detach()
        return torch.where(change.abs() < _SAME, ordinary, (above + below) / change), None, None
