"""A call of a linear layer as one object, so that rules and statistics need not know what kind of layer it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LINEAR_FUNCTIONS", "Operation", "operation"]

_CONVOLUTIONS: dict[Callable[..., Tensor], tuple[int, bool]] = {
    F.conv1d: (1, False),
    F.conv2d: (2, False),
    F.conv3d: (3, False),
    F.conv_transpose1d: (1, True),
    F.conv_transpose2d: (2, True),
    F.conv_transpose3d: (3, True),
}
LINEAR_FUNCTIONS: frozenset[Callable[..., Tensor]] = frozenset({F.linear, *_CONVOLUTIONS})


@dataclass(frozen=True)
class Operation:
    """z = function(input, weight, bias): a Linear over the last axis, or a convolution of any kind.

    Args:
        spatial: Number of spatial axes; 0 for a Linear.
        settings: Further arguments of the function by name.
        pads: Explicit padding in the order of `F.pad`, for padding="same"; the settings then hold none.
        transposed: Whether it is a transposed convolution, whose weight is [in, out / groups, ...].
    """

    function: Callable[..., Tensor]
    spatial: int
    settings: Mapping[str, Any]
    pads: tuple[int, ...]
    transposed: bool

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""
        return self.function(self._padded(input), weight, bias, **self.settings)

    def weight_gradient(self, input: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        """Sum over samples and positions of input times gradient, in the shape of `weight` (its values do nothing)."""
        if not self.spatial:
            rows = math.prod(gradient.shape[:-1])  # -1 would be ambiguous for a layer without inputs
            return gradient.reshape(rows, gradient.shape[-1]).T @ input.reshape(rows, input.shape[-1])
        result: Tensor = self._backward(gradient, self._padded(input), weight, (False, True, False))[1]
        return result

    def input_gradient(self, input: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at `input` (whose values play no part), in its shape."""
        if not self.spatial:
            return gradient @ weight
        result: Tensor = self._backward(gradient, self._padded(input), weight, (True, False, False))[0]
        if input.dim() == self.spatial + 1:
            result = result.squeeze(0)
        if self.pads:
            result = F.pad(result, [-pad for pad in self.pads])
        return result

    def samples(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors cut into samples, each with a first axis of one."""
        if self.spatial and tensors[0].dim() == self.spatial + 1:
            return [tensors]
        return list(zip(*(tensor.split(1) for tensor in tensors), strict=True))

    def _padded(self, input: Tensor) -> Tensor:
        return F.pad(input, self.pads) if self.pads else input

    def _backward(self, gradient: Tensor, input: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> Any:
        if input.dim() == self.spatial + 1:
            input, gradient = input.unsqueeze(0), gradient.unsqueeze(0)
        settings = self.settings
        return torch.ops.aten.convolution_backward(
            gradient,
            input,
            weight,
            None,
            settings["stride"],
            settings["padding"],
            settings["dilation"],
            self.transposed,
            settings.get("output_padding", [0] * self.spatial),
            settings["groups"],
            mask,
        )


def operation(
    function: Callable[..., Tensor], weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Operation:
    """Read the further arguments (after input, weight and bias) of a call of one of `LINEAR_FUNCTIONS`."""
    if function is F.linear:
        return Operation(function, 0, {}, (), False)
    spatial, transposed = _CONVOLUTIONS[function]
    names: tuple[str, ...] = ("stride", "padding", "dilation", "groups")
    if transposed:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
    given = dict(zip(names, args, strict=False)) | kwargs
    settings: dict[str, Any] = {"groups": given.get("groups", 1)}
    for name, default in (("stride", 1), ("dilation", 1), *([("output_padding", 0)] if transposed else [])):
        settings[name] = _each(given.get(name, default), spatial)
    padding = given.get("padding", 0)
    pads: list[int] = []
    if padding == "same":
        for size, step in zip(reversed(weight.shape[2:]), reversed(settings["dilation"]), strict=True):
            pads += [step * (size - 1) // 2, step * (size - 1) - step * (size - 1) // 2]
    settings["padding"] = _each(0 if isinstance(padding, str) else padding, spatial)
    return Operation(function, spatial, settings, tuple(pads), transposed)


def _each(value: Any, spatial: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values
