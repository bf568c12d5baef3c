"""Masks in memory: a bit a weight, since they are there during all of the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

__all__ = ["PackedMasks"]


class PackedMasks(MutableMapping[str, Tensor]):
    """Boolean tensors by parameter name, eight values in a byte; whoever asks gets a tensor of booleans.

    Args:
        parameters: By name. A mask has the shape, the device and the order in memory of its parameter, so that both
            are read in one run through memory; also where the parameter has since been moved or put into another order
            (`module.to(memory_format=torch.channels_last)`).
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._packed: dict[str, Tensor] = {}
        self._strides: dict[str, tuple[int, ...]] = {}  # of the order in which the bits were packed

    def __setitem__(self, name: str, mask: Tensor) -> None:
        parameter = self._parameters[name]
        values = torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).copy_(mask)
        parts = torch.zeros(8, -(-values.numel() // 8), dtype=torch.uint8, device=parameter.device)
        parts.view(-1)[: values.numel()] = values.as_strided((values.numel(),), (1,))  # as memory has it: without gaps
        for place in range(1, 8):
            parts[0] |= parts[place] << place
        self._packed[name] = parts[0].clone()
        self._strides[name] = values.stride()

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if self._packed[name].device != parameter.device:
            self._packed[name] = self._packed[name].to(parameter.device)
        mask = self._unpacked(name)
        if mask.stride() == torch.empty_like(parameter, device="meta").stride():
            return mask
        self[name] = mask
        return self._unpacked(name)

    def _unpacked(self, name: str) -> Tensor:
        packed = self._packed[name]
        parts = torch.empty(8, len(packed), dtype=torch.uint8, device=packed.device)
        for place, part in enumerate(parts):
            torch.bitwise_right_shift(packed, place, out=part).bitwise_and_(1)
        return parts.view(torch.bool).view(-1).as_strided(self._parameters[name].shape, self._strides[name])

    def follow(self) -> None:
        """Bring all masks to where their parameters are now."""
        for name, packed in self._packed.items():
            self._packed[name] = packed.to(self._parameters[name].device)

    def __delitem__(self, name: str) -> None:
        del self._packed[name], self._strides[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: object) -> bool:
        return name in self._packed
