"""The nouns of structured pruning: channels that are coupled, and what each tensor loses with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xai_compress.plan import Mask

__all__ = ["ChannelGroup", "ChannelSlice", "channel_mask", "kept_entries"]


@dataclass(frozen=True)
class ChannelSlice:
    """What one tensor loses with a channel.

    Args:
        name: Of a parameter or buffer, as the state dict has it.
        axis: Along which.
        index: int64 of shape [channels, entries]: the entries along the axis that go with each channel.
        makes: Whether these weights compute the channel; else they use it, scale it or keep its statistics.
    """

    name: str
    axis: int
    index: Tensor
    makes: bool = False


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are coupled over several tensors, by a residual connection, say: each goes everywhere or nowhere.

    Args:
        name: Of the first weight that makes them.
        slices: All tensors that shrink with them.
    """

    name: str
    slices: tuple[ChannelSlice, ...]

    def __len__(self) -> int:
        """Number of channels."""
        return len(self.slices[0].index)

    @property
    def makers(self) -> list[ChannelSlice]:
        """The slices of the weights that compute the channels."""
        return [each for each in self.slices if each.makes]


def kept_entries(
    groups: Iterable[ChannelGroup], removed: Mapping[str, Tensor], sizes: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, Tensor]]:
    """What stays of every tensor that shrinks.

    Args:
        groups: All of them.
        removed: Boolean tensors of shape [channels] by name of the group, True where a channel goes.
        sizes: Shapes of the tensors to speak of, by name.

    Returns:
        Name -> axis -> ascending indices that stay; tensors and axes that keep everything are left out.
    """
    going: dict[tuple[str, int], list[Tensor]] = {}
    for group in groups:
        gone = removed.get(group.name)
        if gone is None or not bool(gone.any()):
            continue
        for part in (each for each in group.slices if each.name in sizes):
            going.setdefault((part.name, part.axis), []).append(part.index[gone.cpu()].flatten())
    found: dict[str, dict[int, Tensor]] = {}
    for (name, axis), indices in going.items():
        stays = torch.ones(sizes[name][axis], dtype=torch.bool)
        stays[torch.cat(indices)] = False
        found.setdefault(name, {})[axis] = stays.nonzero().squeeze(1)
    return found


def channel_mask(groups: Iterable[ChannelGroup], removed: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Mask:
    """The mask under which a model computes what it will compute without these channels.

    Weights that make a removed channel are masked as well as those that use it, so that whatever it holds in between
    (a shift of a BatchNorm, say) goes nowhere.

    Args:
        groups, removed: As for `kept_entries`.
        weights: The weights that can be masked, by name; of other tensors nothing is said.
    """
    kept = kept_entries(groups, removed, {name: tensor.shape for name, tensor in weights.items()})
    keep = {}
    for name, weight in weights.items():
        stays = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        for axis, indices in kept.get(name, {}).items():
            along = torch.zeros(weight.shape[axis], dtype=torch.bool, device=weight.device)
            along[indices.to(weight.device)] = True
            stays &= along.view([-1 if at == axis else 1 for at in range(weight.dim())])
        keep[name] = stays
    return Mask(keep)
