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

    Layers are watched from the beginning, so that a compiled model knows of the hooks; nothing happens before ranges
    are measured. `detach` leaves the model as it was found.

    Args:
        layers: Linear layers and convolutions by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.ranges: dict[str, tuple[float, float]] = {}
        self._observing = False
        self._paused = False
        self._hooks: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self._hook_of(name)) for name, layer in layers.items()
        ]

    def _hook_of(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._paused or not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].is_floating_point():
                return None
            if self._observing:
                self._observe(name, inputs[0])
                return None
            if name not in self.ranges:
                return None
            return (fake_quantize(inputs[0], *self.ranges[name]), *inputs[1:])

        return hook

    def _observe(self, name: str, values: Tensor) -> None:
        finite = values.detach()[values.detach().isfinite()]
        if finite.numel():
            low, high = (float(end) for end in finite.aminmax())
            before = self.ranges.get(name, (0.0, 0.0))  # zero lies in every range
            self.ranges[name] = (min(low, before[0]), max(high, before[1]))

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the ranges anew, from the forward passes inside, with float activations."""
        self.ranges, self._observing = {}, True
        try:
            yield
        finally:
            self._observing = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Float activations inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def detach(self) -> None:
        """Take the hooks off; may be called twice."""
        while self._hooks:
            self._hooks.pop().remove()


def fake_quantize(values: Tensor, low: float, high: float) -> Tensor:
    """Round to the 256 levels of a range, in float.

    Args:
        values: Any shape, floating point.
        low, high: Ends of the range, low <= 0 <= high; the lower end moves by up to half a step, so that zero is exact.

    Returns:
        Same shape and dtype; where low = high, the values as they are.
    """
    scale = (high - low) / _LEVELS
    if not scale > torch.finfo(torch.float32).tiny:
        return values
    zero = min(max(round(-low / scale), 0), _LEVELS)
    rounded: Tensor = torch.fake_quantize_per_tensor_affine(values.float(), scale, zero, 0, _LEVELS)
    return rounded.to(values.dtype)


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
