"""What each channel is worth, from the scores of its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_xai_compress.plan import ScoreMap
from lightning_xai_compress.structure.channels import ChannelGroup, ChannelSlice

__all__ = ["CHANNEL_SCORES", "ChannelScore", "channel_scores", "check_channel_score"]

ChannelScore = Literal["sum", "mean", "rms", "output"]
CHANNEL_SCORES: tuple[str, ...] = get_args(ChannelScore)


def check_channel_score(score: object) -> None:
    """Refuse what is no way to score a channel.

    Raises:
        ValueError: With the names there are.
    """
    if score not in CHANNEL_SCORES:
        raise ValueError(f"a channel's score must be one of {', '.join(CHANNEL_SCORES)}, got {score!r}")


def channel_scores(groups: Iterable[ChannelGroup], scores: ScoreMap, how: ChannelScore = "sum") -> dict[str, Tensor]:
    """Score channels by the weights that make them.

    Relevance is conserved from layer to layer, so every layer has an importance of 1 to share out among its channels.
    Where several layers make the same channels (a residual stream), what passes through a channel is the sum of what
    they put there.

    Args:
        groups: Coupled channels.
        scores: Of the weights.
        how: "sum", "mean" (the same, as a share of the layer) or "rms" (root of the mean square) of the scores of the
            weights of its filter; or "output": the absolute value of their summed relevance, which is the relevance of
            the channel itself as far as a rule conserves it (Yeom et al. 2021 prune filters by it).

    Returns:
        Name of the group -> float32 of shape [channels], >= 0: the sum of a channel's shares in the layers that make
        it. A layer whose weights are not all known for a channel counts like the mean of the others; NaN where there is
        none.

    Raises:
        ValueError: No such way, or one that needs a sign that the scores have not.
    """
    check_channel_score(how)
    if how == "output" and not scores.signed:
        raise ValueError(
            "a channel's score 'output' is of signed relevance: use criterion 'lrp', 'deeplift' or 'taylor'"
        )
    found = {}
    for group in groups:
        known = [part for part in group.makers if part.name in scores.score]
        if not known:
            found[group.name] = torch.full((len(group),), torch.nan)
            continue
        shares = torch.stack([_shares(_of(part, scores, how)) for part in known])
        found[group.name] = shares.nanmean(0) * len(group.makers)
    return found


def _shares(values: Tensor) -> Tensor:
    return values / values.nansum().clamp(min=torch.finfo(values.dtype).tiny)


def _of(part: ChannelSlice, scores: ScoreMap, how: ChannelScore) -> Tensor:
    values = (scores.relevance if how == "output" else scores.score)[part.name].float().movedim(part.axis, 0)
    filters = values[part.index.to(values.device)].flatten(1)
    if how == "rms":
        return filters.square().mean(1).sqrt().cpu()
    if how == "mean":
        return filters.mean(1).abs().cpu()
    return filters.sum(1).abs().cpu()
