"""What each channel is worth, from the scores of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_xai_compress.plan import ScoreMap
from lightning_xai_compress.structure.channels import ChannelGroup, ChannelSlice

__all__ = ["CHANNEL_SCORES", "ChannelScore", "channel_scores", "check_channel_score", "relative"]

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

    Args:
        groups: Coupled channels; where several layers make them, the mean over these layers counts.
        scores: Of the weights.
        how: "sum", "mean" or "rms" (root of the mean square) of the scores of the weights of its filter; or "output":
            the absolute value of their summed relevance, which is the relevance of the channel itself as far as a rule
            conserves it (Yeom et al. 2021 prune filters by it).

    Returns:
        Name of the group -> float32 of shape [channels], over the layers whose weights are all known for that channel;
        NaN where there is none.

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
        found[group.name] = torch.stack([_of(part, scores, how) for part in known]).nanmean(0)
    return found


def _of(part: ChannelSlice, scores: ScoreMap, how: ChannelScore) -> Tensor:
    values = (scores.relevance if how == "output" else scores.score)[part.name].float().movedim(part.axis, 0)
    filters = values[part.index.to(values.device)].flatten(1)
    if how == "rms":
        return filters.square().mean(1).sqrt().cpu()
    if how == "mean":
        return filters.mean(1).cpu()
    return filters.sum(1).abs().cpu()


def relative(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores over the mean of their group, so that those of layers with few and with many weights compare."""
    return {name: each / each.nanmean().clamp(min=torch.finfo(each.dtype).tiny) for name, each in scores.items()}
