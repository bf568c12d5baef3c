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
            are read in one run through memory.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._packed: dict[str, Tensor] = {}

    def __setitem__(self, name: str, mask: Tensor) -> None:
        parameter = self._parameters[name]
        values = torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).copy_(mask)
        parts = torch.zeros(8, -(-values.numel() // 8), dtype=torch.uint8, device=parameter.device)
        parts.view(-1)[: values.numel()] = values.as_strided((values.numel(),), (1,))  # as memory has it: without gaps
        for place in range(1, 8):
            parts[0] |= parts[place] << place
        self._packed[name] = parts[0].clone()

    def __getitem__(self, name: str) -> Tensor:
        packed, parameter = self._packed[name].to(self._parameters[name].device), self._parameters[name]
        parts = torch.empty(8, len(packed), dtype=torch.uint8, device=packed.device)
        for place, part in enumerate(parts):
            torch.bitwise_right_shift(packed, place, out=part).bitwise_and_(1)
        stride = torch.empty_like(parameter, device="meta").stride()
        return parts.view(torch.bool).view(-1).as_strided(parameter.shape, stride)

    def __delitem__(self, name: str) -> None:
        del self._packed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: object) -> bool:
        return name in self._packed
