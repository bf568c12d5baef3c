"""What channels cost: parameters and multiply-accumulate operations, before and after some of them go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_xai_compress.errors import CompressionError
from lightning_xai_compress.structure.channels import ChannelGroup

__all__ = ["Cost", "Measure", "macs_of"]

Measure = Literal["channels", "parameters", "macs"]


def macs_of(model: nn.Module, run: Callable[[], object]) -> tuple[dict[str, float], float]:
    """Multiply-accumulate operations of a forward pass, half of what `torch.utils.flop_counter` counts.

    Args:
        model: That runs.
        run: The forward pass.

    Returns:
        Name of a weight -> those of its layer, for Linear and convolutions; and those of everything else, which no
        channel changes.

    Raises:
        CompressionError: Nothing was counted.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see into it
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    counts = {name: sum(each.values()) / 2 for name, each in counter.get_flop_counts().items()}
    total = counts.get("Global", 0.0)
    if not total:
        raise CompressionError(f"{type(model).__name__} has no multiplications to count in its forward pass")
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        key = f"{type(model).__name__}.{name}"
        if isinstance(weight, nn.Parameter) and weight.dim() > 1 and key in counts and not [*module.children()]:
            found[f"{name}.weight".removeprefix(".")] = counts[key]
    return found, total - sum(found.values())


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    price: float  # of one entry


class Cost:
    """What is left of a measure while channels go; every tensor costs in proportion to the entries it keeps.

    Args:
        groups: The channels that may go.
        shapes: Of all tensors that cost something, by name.
        prices: What one entry of each costs: 1 where parameters count, the positions it is multiplied at where
            operations do.
        rest: What no channel changes.
    """

    def __init__(
        self,
        groups: Iterable[ChannelGroup],
        shapes: Mapping[str, Sequence[int]],
        prices: Mapping[str, float],
        rest: float = 0.0,
    ) -> None:
        self._tensors = {name: _Tensor(tuple(shapes[name]), price) for name, price in prices.items()}
        self._kept = {name: list(shapes[name]) for name in self._tensors}
        self._groups = {group.name: group for group in groups}
        self._rest = rest
        self.total = self.now = rest + sum(self._of(name) for name in self._tensors)

    def _of(self, name: str) -> float:
        numel = 1.0
        for size in self._kept[name]:
            numel *= size
        return numel * self._tensors[name].price

    def remove(self, group: str, channels: int) -> float:
        """Let so many channels of a group go; the share of the total that is left."""
        for part in self._groups[group].slices:
            if part.name in self._tensors:
                self.now -= self._of(part.name)
                self._kept[part.name][part.axis] -= channels * part.index.shape[1]
                self.now += self._of(part.name)
        return self.share

    def saving(self, group: str) -> float:
        """Share of the total that one more channel of a group would save."""
        before = self.now
        self.remove(group, 1)
        after = self.now
        self.remove(group, -1)
        self.now = before  # to the last digit
        return (before - after) / self.total if self.total else 0.0

    @property
    def share(self) -> float:
        """Of the total, in [0, 1]."""
        return self.now / self.total if self.total else 1.0
