"""Which channels go: the least important ones, in blocks that leave round numbers of channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xai_compress.structure.channels import ChannelGroup
from lightning_xai_compress.structure.cost import Cost

__all__ = ["select_channels"]


@dataclass(frozen=True, eq=False)
class _Block:
    loss: float
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
    """Let the channels go that matter least for what they cost, until no more than a share of a measure is left.

    Those of the smallest score for each share of the cost that is saved go first, which solves the knapsack but for
    its last items (Dantzig 1957; Shen et al. 2022 weigh channels' importance against latency so): where the last one
    saves more than is needed, others stay instead. Channels go in blocks, so that those that stay are a multiple of 8,
    say, which kernels are fast at. Ties go by name of the group, then by index.

    Args:
        groups: What may go.
        scores: Of shape [channels], >= 0, by name of the group, from `channel_scores`; a channel of unknown score
            (NaN) stays.
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
    losses = {group.name: _divided(scores[group.name], cost.saving(group.name)) for group in groups}
    blocks = [block for group in groups for block in _blocks(group, losses[group.name], removed, multiple, floor)]
    taken: list[_Block] = []
    for block in sorted(blocks, key=lambda block: block.loss):  # stable
        if cost.share <= share:
            break
        cost.remove(block.group, len(block.channels))
        taken.append(block)
    needless = _not_needed(taken, cost, share)
    for block in taken:
        removed[block.group][block.channels] = block not in needless
    return removed


def _not_needed(taken: Sequence[_Block], cost: Cost, share: float) -> list[_Block]:
    """Where the last block saved more than was needed, others can stay, those of most loss first."""
    spared: list[_Block] = []
    needed: set[str] = set()  # groups of which a worse block has to go
    for block in reversed(taken):
        if block.group in needed:
            continue
        before = cost.now
        if cost.remove(block.group, -len(block.channels)) <= share:
            spared.append(block)
        else:
            cost.remove(block.group, len(block.channels))
            cost.now = before  # to the last digit
            needed.add(block.group)
    return spared


def _divided(scores: Tensor, saving: float) -> Tensor:
    """By the share of the cost that a channel saves; last where that is nothing, NaN where unknown."""
    return scores / saving if saving > 0 else torch.where(scores.isnan(), scores, math.inf)


def _blocks(
    group: ChannelGroup, losses: Tensor, removed: Mapping[str, Tensor], multiple: int, floor: float
) -> list[_Block]:
    """Those of least loss first; each of no less than the one before, since it can only follow it."""
    kept = (~removed[group.name]).nonzero().squeeze(1)
    order = kept[losses[kept].sort(stable=True).indices]
    known = order[~losses[order].isnan()]
    size = multiple if len(group) >= 2 * multiple else 1
    least = max(size, math.ceil(floor * len(group) - 1e-9))
    found: list[_Block] = []
    left, at, worst = len(order), 0, -math.inf
    while True:
        count = left % size or size
        if left - count < least or at + count > len(known):
            return found
        channels = known[at : at + count]
        worst = max(worst, float(losses[channels].mean()))
        found.append(_Block(worst, group.name, channels))
        left, at = left - count, at + count
