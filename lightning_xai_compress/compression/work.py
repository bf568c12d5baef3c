"""A model on its way to be compressed, and the values that it came with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_xai_compress.budget import Drafts
from lightning_xai_compress.criteria import Criterion, criterion_name, score
from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.formats import Files, entropy_price, packed_size, round_to_float16
from lightning_xai_compress.formats.merging import merge_batchnorm
from lightning_xai_compress.layers import find_layers
from lightning_xai_compress.plan import CompressionPlan, Mask, ScoreMap, unknown_rows
from lightning_xai_compress.pruning import Choice, cubic, matching, select_mask
from lightning_xai_compress.quantization import Allocated, measure_widths, quantize
from lightning_xai_compress.relevance import Ends, known_names, tracked_norms, update_batchnorm
from lightning_xai_compress.report import PathPoint, dense_bytes

__all__ = ["State", "Work", "relevance_shares"]

_VALUE_BITS = 1.3  # of a kept weight: without training, keeping more weights beats finer grids


@dataclass(frozen=True)
class State:
    """A compressed state of a model.

    Args:
        values: Of all parameters and buffers, by name.
        plan: Says what they are.
        scores: What they rest on.
        positives: Weights of positive relevance that were pruned.
    """

    values: Mapping[str, Tensor]
    plan: CompressionPlan
    scores: ScoreMap
    positives: int


class Work:
    """A model that is compressed, perhaps several times, always from the values that it came with.

    Args:
        model: Changed in place.
        batches: Gone through for every scoring, and for BatchNorm statistics.
        exclude, criterion, selection, bits, choice, steps, files: See `compress`.

    Attributes:
        plan: Of the values that the model holds; None while these are its own.
        scores: The latest of those that it rests on.
        positives: Weights of positive relevance that were pruned.
        path: What was tried.

    Raises:
        ValueError: No batches, or a pattern that matches nothing.
        CompressionError: No compressible layer.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        exclude: Sequence[str],
        criterion: str | Criterion,
        selection: Literal["least", "nonpositive"],
        bits: tuple[int, ...],
        choice: Choice,
        steps: int,
        files: Files,
    ) -> None:
        layers = find_layers(model, exclude=exclude)
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("batches is empty: give some hundred samples of the training data, in batches")
        parameters = dict(model.named_parameters())
        weights = {name: parameters[name] for name in layers.names}
        ends = Ends.of(model, weights, lambda: first)
        protected = matching(known_names(model, weights), choice.protect)
        self.model, self.bits, self.steps, self.files = model, bits, steps, files
        self.choice = replace(
            choice, protect=tuple(sorted(protected)), outputs=choice.outputs or {ends.last: ends.axis}
        )
        self._batches, self._names = batches, layers.names
        self._criterion, self._selection = criterion, selection
        self._skipped = list(layers.skipped)
        self._own = _copies(model)
        self._dense_scores: ScoreMap | None = None
        self._provenance = {"model": type(model).__qualname__, "criterion": criterion_name(criterion)}
        self.plan: CompressionPlan | None = None
        self.scores: ScoreMap | None = None
        self.positives = 0
        self.path: list[PathPoint] = []

    def state(self) -> State:
        """What the model holds now."""
        assert self.plan is not None
        assert self.scores is not None
        return State(_copies(self.model), self.plan, self.scores, self.positives)

    def load(self, state: State) -> None:
        """The model holds a state again."""
        _fill(self.model, state.values)
        self.plan, self.scores, self.positives = state.plan, state.scores, state.positives

    def restore(self) -> None:
        """The model holds what it came with."""
        _fill(self.model, self._own)

    def dense_scores(self) -> ScoreMap:
        """Of the weights that the model came with, made once.

        Raises:
            RelevanceError: They cannot be made, or are zero everywhere.
        """
        if self._dense_scores is None:
            self._dense_scores = self._scored()
            self._skipped += unknown_rows(self._dense_scores.score)
        return self._dense_scores

    def least(self) -> int:
        """Bytes with as much pruned as may be, at the narrowest widths."""
        self.restore()
        return self._drafts(self.dense_scores(), None).smallest().bytes

    def most(self) -> int:
        """Bytes with nothing pruned, at the widest widths."""
        self.restore()
        return self._drafts(self.dense_scores(), None).filled(dense_bytes(self.model), 0.0).bytes

    def shrink(self, limit: float) -> int:
        """Make the model fit a number of bytes, as far as can be told before BatchNorm has its statistics.

        Returns:
            Those of its packed file; more than the limit where nothing fits.
        """

        goal = 0.0
        if self.steps > 1:  # how far to go hardly depends on which weights go
            self.restore()
            goal = self._drafts(self.dense_scores(), None).pruned(limit, _VALUE_BITS).mask.sparsity
        scores, previous = self.rounds(goal, steps=self.steps)
        drafts = self._drafts(scores, previous)
        pruned = drafts.pruned(limit, _VALUE_BITS, low=previous.sparsity if previous else 0.0)
        filled = drafts.filled(limit, pruned.mask.sparsity)
        found = filled if filled.bytes <= limit else pruned
        self._count(scores, previous, found.mask)
        return self.settle(found.mask, found.allocated)

    def rounds(self, sparsity: float, *, steps: int) -> tuple[ScoreMap, Mask | None]:
        """All rounds of pruning but the last one.

        Args:
            sparsity: To end at, after the last one.
            steps: Number of all rounds.

        Returns:
            Scores that the last round is to go by, and the mask so far; None before the first round.
        """
        self.restore()
        self.positives = 0
        scores, previous = self.dense_scores(), None
        for step in range(1, steps):
            previous = self.prune(scores, cubic(step / steps, final=sparsity), previous)
            self._put(self.masked(previous))
            scores = self._scored()
        self.scores = scores
        return scores, previous

    def prune(self, scores: ScoreMap, sparsity: float, previous: Mask | None) -> Mask:
        """What a sparsity leaves."""
        mask = self._select(scores, sparsity, previous)
        self._count(scores, previous, mask)
        return mask

    def masked(self, mask: Mask) -> dict[str, Tensor]:
        """The weights that the model came with, zero where a mask prunes."""
        return {name: self._own[name].masked_fill(~mask[name].to(self._own[name].device), 0.0) for name in self._names}

    @torch.no_grad()
    def settle(self, mask: Mask, allocated: Allocated | None) -> int:
        """Make a candidate real: the model holds what its files will; returns the bytes of the packed one."""
        weights = self.masked(mask)
        if allocated is not None:
            bits, scales = allocated.allocation, allocated.scales
            weights = {name: quantize(each, bits[name], scales[name]) for name, each in weights.items()}
        self._put(weights)
        left = merge_batchnorm(self.model, set(self._names)) if self.files.merge_batchnorm else []
        left += round_to_float16(self.model, set(self._names)) if self.files.float16 else []
        self.plan = CompressionPlan(
            mask,
            allocated.allocation if allocated else None,
            allocated.scales if allocated else {},
            (*self._skipped, *left),
            self._provenance,
        )
        return packed_size(self.model, self.plan).total

    def _select(self, scores: ScoreMap, sparsity: float, previous: Mask | None) -> Mask:
        return select_mask(scores, sparsity, selection=self._selection, previous=previous, choice=self.choice).mask

    def _count(self, scores: ScoreMap, previous: Mask | None, mask: Mask) -> None:
        """Weights of positive relevance that a mask takes away from an earlier one."""
        for name, keep in mask.keep.items():
            gone = ~keep if previous is None else previous[name] & ~keep
            self.positives += int((gone & (scores.relevance[name] > 0)).sum())

    def _drafts(self, scores: ScoreMap, previous: Mask | None) -> Drafts:
        return Drafts(
            self.model,
            {name: self._own[name] for name in self._names},
            select=lambda sparsity: self._select(scores, sparsity, previous),
            measure=lambda weights: measure_widths(weights, scores, bits=self.bits, price=entropy_price),
            files=self.files,
            skipped=tuple(self._skipped),
            provenance=self._provenance,
        )

    def _scored(self) -> ScoreMap:
        scores = score(self.model, self._batches, self._criterion, layers=self._names)
        if not sum(relevance_shares(scores).values()):
            raise RelevanceError("relevance is zero everywhere: what is explained does not depend on the weights")
        return scores

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        """Give the model other weights, and BatchNorm statistics that go with them."""
        self.restore()
        _fill(self.model, weights)
        norms = tracked_norms(self.model, gathering=False)
        if norms and not update_batchnorm(self.model, norms, self._batches):
            warnings.warn("BatchNorm statistics stay those of the dense model: no batch gave any", stacklevel=2)
        statistics = {id(buffer) for norm in norms for buffer in norm.buffers()}
        others = [name for name, buffer in self.model.named_buffers() if id(buffer) not in statistics]
        _fill(self.model, {name: self._own[name] for name in others if name in self._own})  # a forward pass may write


def relevance_shares(scores: ScoreMap) -> dict[str, float]:
    """Share of each layer in all absolute relevance, by parameter name; zeros where there is none."""
    unknown = set(scores.unknown)
    sums = {name: float(each.abs().nansum()) for name, each in scores.relevance.items() if name not in unknown}
    total = sum(sums.values())
    return {name: value / total if total else 0.0 for name, value in sums.items()}


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in values.items():
        tensors[name].detach().copy_(value)
