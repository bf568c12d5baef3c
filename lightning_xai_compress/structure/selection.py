"""Which channels go: the least important ones, in blocks that leave round numbers of channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xai_compress.structure.channels import ChannelGroup
from lightning_xai_compress.structure.cost import Cost

__all__ = ["select_channels"]


@dataclass(frozen=True)
class _Block:
    score: float
    group: str
    channels: Tensor


def select_channels(
    groups: Iterable[ChannelGroup],
    scores: Mapping[str, Tensor],
    cost: Cost,
    share: float,
    *,
    previous: Mapping[str, Tensor] | None = None,
    multiple: int = 8,
    floor: float = 0.1,
) -> dict[str, Tensor]:
    """Let the least important channels go until no more than a share of a measure is left.

    Channels go in blocks, so that those that stay are a multiple of 8, say, which kernels are fast at: a block is as
    important as its channels on average. Ties go by name of the group, then by index.

    Args:
        groups: What may go.
        scores: Of shape [channels] by name of the group, from `channel_scores`; a channel of unknown score (NaN) stays.
        cost: Of everything, nothing removed yet; it is used up.
        share: Of the total, in (0, 1].
        previous: What has gone before, and stays away.
        multiple: Of which the channels that stay are one; groups with fewer channels than two of it are taken one by
            one.
        floor: Share of each group's channels that stays at least, in [0, 1); one block always does.

    Returns:
        Boolean tensors of shape [channels] by name of the group, True for what goes; as close to the share as blocks
        allow, from below, but for floors.
    """
    groups = sorted(groups, key=lambda group: group.name)
    removed = {group.name: torch.zeros(len(group), dtype=torch.bool) for group in groups}
    for name, gone in (previous or {}).items():
        removed[name] = gone.clone()
        if bool(gone.any()):
            cost.remove(name, int(gone.sum()))
    blocks = [block for group in groups for block in _blocks(group, scores[group.name], removed, multiple, floor)]
    for block in sorted(blocks, key=lambda block: block.score):  # stable
        if cost.share <= share:
            break
        removed[block.group][block.channels] = True
        cost.remove(block.group, len(block.channels))
    return removed


def _blocks(
    group: ChannelGroup, scores: Tensor, removed: Mapping[str, Tensor], multiple: int, floor: float
) -> list[_Block]:
    """Least important first; each at least as important as the one before, since it can only follow it."""
    kept = (~removed[group.name]).nonzero().squeeze(1)
    order = kept[scores[kept].sort(stable=True).indices]
    known = order[~scores[order].isnan()]
    size = multiple if len(group) >= 2 * multiple else 1
    least = max(size, math.ceil(floor * len(group) - 1e-9))
    found: list[_Block] = []
    left, at, worst = len(order), 0, -math.inf
    while True:
        count = left % size or size
        if left - count < least or at + count > len(known):
            return found
        channels = known[at : at + count]
        worst = max(worst, float(scores[channels].mean()))
        found.append(_Block(worst, group.name, channels))
        left, at = left - count, at + count
