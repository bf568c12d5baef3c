"""Which weights go: by a ranking of all of them, of the non-positive ones first, or of those alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_xai_compress.plan import Mask, ScoreMap
from lightning_xai_compress.pruning.choice import Choice, matching
from lightning_xai_compress.ranking import lamp

__all__ = [
    "WORSE_THAN_RANDOM",
    "Selection",
    "SelectionRule",
    "check_rule",
    "nonpositive_share",
    "prunable",
    "select_mask",
]

SelectionRule = Literal["nonpositive", "literal", "least"]

WORSE_THAN_RANDOM = (
    "selection='literal' prunes every weight with relevance <= 0 at once, about half of them, all that inhibit among "
    "them: in our studies the model was then worse than after random pruning of as many. It is there to reproduce the "
    "paper's rule; selection='nonpositive' takes the same weights gradually, the least important first"
)


@dataclass(frozen=True)
class Selection:
    """A mask and how it came about.

    Args:
        mask: Which weights stay.
        removed: Weights that this step removed.
        positive: Those among them whose relevance was positive.
        exhausted: Whether rule and floors had too few weights to offer for the sparsity asked for.
    """

    mask: Mask
    removed: int
    positive: int
    exhausted: bool


def select_mask(
    scores: ScoreMap,
    sparsity: float | None,
    *,
    selection: SelectionRule = "least",
    previous: Mask | None = None,
    positives: bool = True,
    choice: Choice | None = None,
) -> Selection:
    """Remove the least important weights until `sparsity` of all weights are gone.

    Weights of unknown score (NaN) stay and count in the total; what `previous` removed stays removed. No layer is ever
    emptied. Ties go by parameter name, then by index.

    Args:
        scores: One score and one signed relevance a weight.
        sparsity: Share of all weights to be gone afterwards, in [0, 1). A mask that is sparser already stays as it is.
            None with "literal".
        selection: "least": smallest score first. "nonpositive": weights with relevance <= 0 first, smallest score
            first (Soroush et al. 2023 remove this set; the order within it is ours). "literal": all weights with
            relevance <= 0 at once, as that paper may be read; warns, since this is worse than random pruning.
        previous: Mask so far.
        positives: With "nonpositive": whether positive weights follow, least first, when the set runs out.
        choice: Scope, floors, normalization and protected layers.

    Raises:
        ValueError: `sparsity` outside [0, 1), no such rule, one that needs a sign where there is none, or a pattern
            that matches no layer.
    """
    choice = choice or Choice()
    check_rule(selection)
    if selection == "literal":
        if sparsity is not None:
            raise ValueError(f"selection='literal' takes all weights with relevance <= 0: sparsity={sparsity} must go")
    elif sparsity is None or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    if selection == "least":
        if choice.confidence is not None:
            raise ValueError("confidence is of the sign of relevance: use selection='nonpositive', or leave it out")
    elif not scores.signed:
        raise ValueError(f"selection={selection!r} needs scores with a sign, such as those of 'lrp'")
    if selection == "literal":
        warnings.warn(WORSE_THAN_RANDOM, stacklevel=2)
    ranking = _Ranking(scores, previous, choice, by_sign=selection != "least")
    total = len(ranking.kept)
    goal = total - 1 if sparsity is None else min(round(sparsity * total), total - 1)  # below 1 leaves something
    wanted = goal - int((~ranking.kept).sum())
    if wanted <= 0:
        return Selection(previous or ranking.mask(ranking.kept), 0, 0, False)
    if selection == "literal" or (selection == "nonpositive" and not positives):
        ranking.removable &= ranking.first
    order = ranking.evenly() if choice.scope == "layer" else ranking.order
    chosen = order[ranking.removable[order]][:wanted]
    kept = ranking.kept.clone()
    kept[chosen] = False
    negative = _flatten(scores.relevance, ranking.names)[chosen] <= 0
    exhausted = chosen.numel() < wanted or selection == "literal"
    return Selection(ranking.mask(kept), chosen.numel(), int((~negative).sum()), exhausted)


def check_rule(selection: object) -> None:
    """Refuse what is no rule.

    Raises:
        ValueError: With the names there are.
    """
    if selection not in ("nonpositive", "literal", "least"):
        raise ValueError(f"selection must be 'nonpositive', 'literal' or 'least', got {selection!r}")


def nonpositive_share(scores: ScoreMap, confidence: float | None = None) -> float:
    """Share of all weights whose relevance is known and (that surely) not positive, in [0, 1]."""
    total = sum(tensor.numel() for tensor in scores.relevance.values())
    return sum(int(each.sum()) for each in scores.nonpositive(confidence).values()) / total if total else 0.0


def prunable(scores: ScoreMap, choice: Choice | None = None) -> int:
    """How many weights can go at most: neither unknown, nor protected, nor held by a floor. Which, scores decide.

    Raises:
        ValueError: A pattern that matches no layer.
    """
    return int(_Ranking(scores, None, choice or Choice(), by_sign=False).removable.sum())


class _Ranking:
    """All weights in a row, by parameter name and index.

    Args:
        scores, previous, choice: As for `select_mask`.
        by_sign: Whether non-positive weights go before all others.

    Attributes:
        names: Of the parameters, in order.
        kept: Which weights are there yet.
        first: Which of them are non-positive; without `by_sign`, none.
        order: Indices of those that are there, in the order in which they go; unknown ones last.
        removable: Which may go.
    """

    def __init__(self, scores: ScoreMap, previous: Mask | None, choice: Choice, *, by_sign: bool) -> None:
        self._scores = scores.score
        self.names = sorted(scores.score)
        sizes = [scores.score[name].numel() for name in self.names]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self._spans = {name: slice(end - size, end) for name, size, end in zip(self.names, sizes, ends, strict=True)}
        score = _flatten(scores.score, self.names)
        self.kept = torch.ones_like(score, dtype=torch.bool)
        if previous is not None:
            self.kept = torch.cat([previous[name].flatten() for name in self.names]).to(score.device)
        if choice.normalization == "lamp":
            present = score.masked_fill(~self.kept, 0)
            score = torch.cat([lamp(present[span]) for span in self._spans.values()])
        indices = self.kept.nonzero().squeeze(1)  # ascending, and the sort is stable: ties go by index
        self.order = indices[score[indices].sort(stable=True).indices]
        self.first = torch.zeros_like(self.kept)
        if by_sign:
            self.first = self.kept & _flatten(scores.nonpositive(choice.confidence), self.names) & ~score.isnan()
            early = self.first[self.order]
            self.order = torch.cat([self.order[early], self.order[~early]])
        self._rank = torch.full_like(self.kept, -1, dtype=torch.int64)
        self._rank[self.order] = torch.arange(len(self.order), device=score.device)
        self.removable = self.kept & ~score.isnan()
        known = {name: (name, name.rpartition(".")[0]) for name in self.names}
        protected = matching(known, choice.protect)
        for name, span in self._spans.items():
            if name in protected:
                self.removable[span] = False
            elif size := span.stop - span.start:
                least = max(1, math.ceil(choice.floor * size - 1e-9))  # 0.07 * 100 must not become 8 by rounding
                rank = self._rank[span].view_as(scores.score[name])
                self.removable[span][_last(rank, least, choice.outputs.get(name))] = False

    def evenly(self) -> Tensor:
        """Indices of what may go, so that the share that is gone rises alike in all layers."""
        share = torch.empty_like(self._rank, dtype=torch.float64)
        for span in self._spans.values():
            inside = self.removable[span].nonzero().squeeze(1)
            inside = inside[self._rank[span][inside].argsort()]
            places = torch.arange(len(inside), device=inside.device) + int((~self.kept[span]).sum())
            share[span][inside] = (places.double() + 0.5) / (span.stop - span.start)
        indices = self.removable.nonzero().squeeze(1)
        return indices[share[indices].sort(stable=True).indices]

    def mask(self, kept: Tensor) -> Mask:
        """The same in the shapes of the weights."""
        return Mask({name: kept[span].view_as(self._scores[name]) for name, span in self._spans.items()})


def _last(rank: Tensor, least: int, axis: int | None) -> Tensor:
    """Indices in one layer of the `least` weights that would go last; the last one of every output is among them.

    Args:
        rank: Of each weight in the order in which they go; -1 where it is gone.
        least: >= 1; where there are more outputs that have a weight, it is their number.
        axis: That counts the outputs, if the layer makes the model's.
    """
    flat = rank.flatten()
    if axis is not None:
        place = torch.arange(len(flat), device=flat.device).view_as(rank).movedim(axis, 0)
        place = place.reshape(len(place), -1)
        best, column = flat[place].max(1, keepdim=True)
        last = place.gather(1, column)[best >= 0]
        flat = flat.clone()
        flat[last] = torch.iinfo(flat.dtype).max
        least = max(least, len(last))
    return flat.topk(min(least, len(flat))).indices


def _flatten(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])
