"""Which weights go: a global ranking by score, of all weights or of the non-positive ones first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_xai_compress.plan import Mask, ScoreMap

__all__ = ["Selection", "SelectionRule", "nonpositive_share", "select_mask"]

SelectionRule = Literal["nonpositive", "least"]


@dataclass(frozen=True)
class Selection:
    """A mask and how it came about.

    Args:
        mask: Which weights stay.
        removed: Weights that this step removed.
        positive: Those among them whose relevance was positive.
        exhausted: Whether the rule had too few weights to offer for the sparsity asked for.
    """

    mask: Mask
    removed: int
    positive: int
    exhausted: bool


def select_mask(
    scores: ScoreMap,
    sparsity: float,
    *,
    selection: SelectionRule = "least",
    previous: Mask | None = None,
    positives: bool = True,
) -> Selection:
    """Remove the least important weights until `sparsity` of all weights are gone.

    The ranking is global. Weights of unknown score (NaN) stay and count in the total; what `previous` removed stays
    removed. Ties go by parameter name, then by index.

    Args:
        scores: One score and one signed relevance a weight.
        sparsity: Share of all weights to be gone afterwards, in [0, 1). A mask that is sparser already stays as it is.
        selection: "least": smallest score first. "nonpositive": weights with relevance <= 0 first, smallest score
            first (Soroush et al. 2023 remove this set; the order within it is ours).
        previous: Mask so far.
        positives: With "nonpositive": whether positive weights follow, least first, when the set runs out.

    Raises:
        ValueError: `sparsity` outside [0, 1), no such rule, or one that needs a sign where there is none.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    if selection not in ("nonpositive", "least"):
        raise ValueError(f"selection must be 'nonpositive' or 'least', got {selection!r}")
    if selection == "nonpositive" and not scores.signed:
        raise ValueError("selection='nonpositive' needs scores with a sign, such as those of 'lrp'")
    names = sorted(scores.score)
    score = _flatten(scores.score, names)
    kept = torch.ones_like(score, dtype=torch.bool)
    if previous is not None:
        kept = torch.cat([previous[name].flatten() for name in names]).to(score.device)
    goal = min(round(sparsity * score.numel()), score.numel() - 1)  # a share below 1 leaves something
    wanted = goal - int((~kept).sum())
    if wanted <= 0:
        return Selection(previous or _unflatten(kept, scores, names), 0, 0, False)
    candidate = kept & ~score.isnan()
    nonpositive = candidate & (_flatten(scores.relevance, names) <= 0)
    if selection == "nonpositive":
        chosen = _smallest(score, nonpositive, wanted)
        missing = wanted - chosen.numel()
        if missing and positives:
            chosen = torch.cat([chosen, _smallest(score, candidate & ~nonpositive, missing)])
    else:
        chosen = _smallest(score, candidate, wanted)
    kept = kept.clone()
    kept[chosen] = False
    positive = int((~nonpositive[chosen]).sum())
    return Selection(_unflatten(kept, scores, names), chosen.numel(), positive, chosen.numel() < wanted)


def nonpositive_share(scores: ScoreMap) -> float:
    """Share of all weights whose relevance is known and not positive, in [0, 1]."""
    total = sum(tensor.numel() for tensor in scores.relevance.values())
    return sum(int((tensor <= 0).sum()) for tensor in scores.relevance.values()) / total if total else 0.0


def _smallest(score: Tensor, among: Tensor, count: int) -> Tensor:
    """Indices of the `count` smallest scores; `nonzero` is ascending and the sort stable, so ties go by index."""
    indices = among.nonzero().squeeze(1)
    return indices[score[indices].sort(stable=True).indices[:count]]


def _flatten(tensors: object, names: list[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])  # type: ignore[index]


def _unflatten(kept: Tensor, scores: ScoreMap, names: list[str]) -> Mask:
    parts = kept.split([scores.score[name].numel() for name in names])
    return Mask({name: part.view_as(scores.score[name]) for name, part in zip(names, parts, strict=True)})
