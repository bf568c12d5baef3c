"""Activations on 8 bits while training: what layers read is rounded as integer kernels will round it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["FakeActivations", "fake_quantize", "quantizable"]

_LEVELS = 255  # uint8, zero exactly on the grid


class FakeActivations:
    """Fake-quantizes the input of layers to unsigned 8 bits, one static range a layer; gradients pass straight through
    inside the range (Jacob et al. 2018, arXiv 1712.05877, section 3).

    Nothing happens before ranges are measured. `detach` leaves the model as it was found. What `torch.compile` made
    before is forgotten when hooks come and go, since its graphs do not look for them. Steps are tensors, so that new
    ranges need no new graph.

    Args:
        layers: Linear layers and convolutions by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = dict(layers)
        self._ranges: dict[str, tuple[float, float]] = {}
        self._grids: dict[str, tuple[Tensor, Tensor]] = {}
        self._observing = False
        self._paused = False
        self._hooks: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self._hook_of(name)) for name, layer in layers.items()
        ]
        _forget_graphs()

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value that each layer read, zero among them."""
        return dict(self._ranges)

    @ranges.setter
    def ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        self._ranges = dict(ranges)
        for name, layer in self._layers.items():
            step = _step(*self._ranges.get(name, (0.0, 0.0)))
            if step is None:
                self._grids.pop(name, None)
            else:
                self._grids[name] = _tensors(step, next(layer.parameters()).device)

    def _hook_of(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._paused or not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].is_floating_point():
                return None
            if self._observing:
                self._observe(name, inputs[0])
                return None
            if name not in self._grids:
                return None
            return (_on_grid(inputs[0], *self._grids[name]), *inputs[1:])

        return hook

    def _observe(self, name: str, values: Tensor) -> None:
        finite = values.detach()[values.detach().isfinite()]
        if finite.numel():
            low, high = (float(end) for end in finite.aminmax())
            before = self._ranges.get(name, (0.0, 0.0))  # zero lies in every range
            self._ranges[name] = (min(low, before[0]), max(high, before[1]))

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the ranges anew, from the forward passes inside, with float activations and without compilation."""
        self._ranges, self._observing = {}, True
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._observing = False
            self.ranges = self._ranges

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Float activations inside, and no compilation."""
        before, self._paused = self._paused, True
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._paused = before

    def detach(self) -> None:
        """Take the hooks off; may be called twice."""
        if self._hooks:
            while self._hooks:
                self._hooks.pop().remove()
            _forget_graphs()


def fake_quantize(values: Tensor, low: float, high: float) -> Tensor:
    """Round to the 256 levels of a range, in float.

    Args:
        values: Any shape, floating point.
        low, high: Ends of the range, low <= 0 <= high; the lower end moves by up to half a step, so that zero is exact.

    Returns:
        Same shape and dtype; where low = high, the values as they are.
    """
    step = _step(low, high)
    if step is None:
        return values
    return _on_grid(values, *_tensors(step, values.device))


def _step(low: float, high: float) -> tuple[float, int] | None:
    """The distance of two levels, and the code of zero; None for a range of nothing."""
    scale = (high - low) / _LEVELS
    if not scale > torch.finfo(torch.float32).tiny:
        return None
    return scale, min(max(round(-low / scale), 0), _LEVELS)


def _tensors(step: tuple[float, int], device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(step[0], device=device), torch.tensor(float(step[1]), device=device)


def _on_grid(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    rounded: Tensor = _StraightThrough.apply(values.float(), scale, zero)
    return rounded.to(values.dtype)


class _StraightThrough(torch.autograd.Function):
    """`torch.fake_quantize_per_tensor_affine`, to the bit.

    That one takes its step as a number, which is a new graph at every change, or as a tensor, which breaks graphs; and
    it took 2.6 times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        codes = (values * (1 / scale)).round_().add_(zero)
        kept = codes.clamp(0, _LEVELS)
        ctx.save_for_backward(codes == kept)
        return kept.sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, gradient, 0.0), None, None


def _forget_graphs() -> None:
    """`torch.compile` does not check whether a module has got hooks since (`skip_nnmodule_hook_guards`)."""
    torch.compiler.reset()


def quantizable(model: nn.Module, weights: Iterable[str]) -> dict[str, nn.Module]:
    """Layers whose input integer kernels take, by name: Linear and convolutions with one of these weights."""
    wanted = set(weights)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and named.get(id(module.weight)) in wanted
    }
