"""The stage that meets a size: says how far to prune and how many bits there are, and corrects what training moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from lightning_xai_compress.budget import (
    VALUE_BITS,
    Candidate,
    Drafts,
    check_least,
    check_target_size,
    expected_sparsity,
    target_bytes,
    weigh,
)
from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.export import CompressedExport
from lightning_xai_compress.callbacks.precision import MixedPrecision
from lightning_xai_compress.callbacks.pruning import RelevancePruning
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Planned, Stage
from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.formats import Files
from lightning_xai_compress.plan import CompressionPlan, Mask, ScoreMap
from lightning_xai_compress.quantization import Allocated
from lightning_xai_compress.report import PathPoint, dense_bytes

__all__ = ["Budget", "SizeBudget"]

_ROOM = 0.003  # of the target: left free when quantized training begins, since codes drift
_SLACK = 0.006  # of the target: a file smaller than that gets more bits
_ALLOWED = 0.02  # of the target: what a file may be smaller


class Budget(CompressionCallback, Stage):
    """What budgets of size and of accuracy share: candidates on paper, and the path of states that were measured."""

    rank: ClassVar[int] = 4
    needs_scores: ClassVar[bool] = True
    is_budget: ClassVar[bool] = True
    leads: ClassVar[bool] = False  # whether it decides alone, and pruning and precision only lend their settings

    def __init__(self) -> None:
        super().__init__()
        self.path: list[PathPoint] = []
        self.outcome = ""
        self.dense = 0
        self.target = 0
        self.expected = 0.0  # sparsity that the size stands for, about, before there are scores
        self._fit: Session | None = None  # whichever callback leads it

    def __getstate__(self) -> dict[str, Any]:
        """Without the fit that was, as in the base."""
        return {**super().__getstate__(), "_fit": None}

    def stages(self) -> list[Stage]:
        """This one."""
        return [self]

    def begin(self, session: Session) -> None:
        """Find the stages that lend their settings."""
        pruning, precision = session.stage(RelevancePruning), session.stage(MixedPrecision)
        if pruning is None or precision is None:
            raise ValueError(
                f"{type(self).__name__} needs RelevancePruning and MixedPrecision in the same Trainer: it chooses the "
                "sparsity of the one and the bits of the other. Add them, or use XAICompression"
            )
        if pruning.sparsity is not None:
            raise ValueError(
                f"{self.label} chooses the sparsity, but sparsity={pruning.sparsity} is given, too: give one of them"
            )
        if precision.given_bits is not None:
            raise ValueError(
                f"{self.label} chooses the bits, but average_bits={precision.given_bits} is given, too: give one of "
                "them, or the widths to choose from as bits=(...)"
            )
        if pruning.selection == "literal":
            raise ValueError(
                f"{self.label} chooses the sparsity, but selection='literal' has its own: give one of them"
            )
        self.pruning: RelevancePruning = pruning
        self.precision: MixedPrecision = precision
        export = session.stage(CompressedExport)
        self.export: CompressedExport | None = export
        self.files = export.files if export is not None else Files()
        self.dense = self.dense or dense_bytes(session.module)
        self._fit = session

    @property
    def label(self) -> str:
        """The setting that this stage is about."""
        raise NotImplementedError

    def drafts(self, session: Session, scores: ScoreMap) -> Drafts:
        """Candidates of the present weights."""
        previous = session.latent.mask()
        return Drafts(
            session.module,
            session.latent.values(),
            select=lambda sparsity: self.pruning.select(scores, sparsity, previous).mask,
            measure=lambda weights: self.precision.measure(session, scores, weights),
            strategy=self.precision.quantization.strategy,
            files=self.files,
            skipped=tuple(session.skipped),
            provenance=session.provenance,
            smaller=session.smaller,
        )

    @contextmanager
    def halting(self, session: Session) -> Iterator[None]:
        """What cannot be scored leaves the weights as they are, and ends the compression, not the fit."""
        try:
            yield
        except RelevanceError as error:
            session.halt(f"weights could not be scored for their widths: {error}")

    def prune(self, session: Session, scores: ScoreMap, mask: Mask) -> None:
        """Make a mask real, and count what goes although its relevance is positive."""
        before = session.latent.mask()
        for name, keep in mask.keep.items():
            gone = before[name] & ~keep.to(before[name].device)
            self.pruning.positives += int((gone & (scores.relevance[name].to(gone.device) > 0)).sum())
        session.latent.apply_mask(mask)

    def apply(self, session: Session, scores: ScoreMap, candidate: Candidate, batch: int, event: str) -> None:
        """Make a candidate real, and remember it as an event of this name."""
        self.prune(session, scores, candidate.mask)
        found = candidate.allocated
        importance = self.precision.importance(session, scores)
        session.latent.apply_bits(found.allocation, found.scales, found.codebooks, importance)
        sparsity = candidate.mask.sparsity
        message = f"{event} to {candidate.bytes:,} bytes ({sparsity:.2%} pruned)"
        session.record(event, batch, message, sparsity=sparsity, bytes=candidate.bytes)

    def bytes(self, session: Session) -> int:
        """Of the packed file of the present model."""
        plan = session.latent.plan(tuple(session.skipped), provenance=session.provenance)
        return weigh(session.module, plan, self.files, session.smaller)

    def measured(self, session: Session, value: float | None) -> None:
        """A validation is over: one more state of the path."""
        plan = session.latent.plan()
        bits = plan.allocation.average_bits if plan.allocation else None
        point = PathPoint(session.epoch_after_batch(), self.bytes(session), value, plan.mask.sparsity, bits)
        self.path.append(point)

    def state(self) -> dict[str, Any]:
        """The path so far."""
        return {"path": [asdict(point) for point in self.path], "outcome": self.outcome, "dense": self.dense}

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        self.path = [PathPoint(**point) for point in state.get("path", [])]
        self.outcome = state.get("outcome", "")
        self.dense = state.get("dense", 0)


class SizeBudget(Budget):
    """Meet a file size: sparsity and bits are chosen together, for the bytes of the packed file.

    The first pruning step plans the sparsity from its scores, and the first one after three quarters of the steps plans
    it again. When quantized training begins, candidates are weighed again and the last weights go; what training moves
    afterwards is corrected at every epoch, and after the last batch, so that the file ends within 2 % of the target,
    from below. To be used beside `RelevancePruning` and `MixedPrecision`.

    Args:
        target_size: Share of the dense file (fp32, safetensors) in (0, 1), or a whole number of bytes.

    Raises:
        ValueError: Out of range; (in fit) beside a sparsity, or no smaller than the dense file.
        BudgetError: (in fit, before training) all that may be pruned is not enough.
    """

    def __init__(self, target_size: float | int) -> None:
        super().__init__()
        self.target_size = check_target_size(target_size)

    @property
    def label(self) -> str:
        """The setting."""
        return f"target_size={self.target_size}"

    def begin(self, session: Session) -> None:
        """Turn the target into bytes."""
        super().begin(session)
        self.target = target_bytes(self.target_size, self.dense)
        count = sum(parameter.numel() for parameter in session.latent.parameters.values())
        self.expected = expected_sparsity(self.target, self.dense, count, self.precision.average_bits)

    def check_scores(self, scores: ScoreMap) -> None:
        """Refuse a target below what is left when all is pruned that may be."""
        assert self._fit is not None
        least = self.drafts(self._fit, scores).smallest()
        check_least(least.bytes, self.target, self.files)

    def planned(self, batch: int) -> Planned:
        """The sparsity that the size stands for: about, until scores are there."""
        return Planned(budget=f"{self.target:,} bytes")

    def planned_sparsity(self, session: Session, scores: ScoreMap) -> float:
        """Where the ramp of pruning ends; by the scores at its beginning."""
        found = None
        with self.halting(session):
            found = self.drafts(session, scores).pruned(self.target, VALUE_BITS)
        if found is None:
            return session.latent.mask().sparsity
        session.record(
            "planned",
            session.batch,
            f"{self.target:,} bytes are about {found.mask.sparsity:.1%} sparsity",
            sparsity=found.mask.sparsity,
            target=self.target,
        )
        return found.mask.sparsity

    def quantized(self, session: Session, scores: ScoreMap) -> Allocated:
        """Widths that fill the target when quantized training begins; where none do, some more weights go first."""
        found = self._filling(session, scores, self.target * (1 - _ROOM))
        self.prune(session, scores, found.mask)
        return found.allocated

    def _filling(self, session: Session, scores: ScoreMap, limit: float) -> Candidate:
        """Bits fill what pruning has left, or else some more weights go."""
        drafts, sparsity = self.drafts(session, scores), session.latent.mask().sparsity
        found = drafts.filled(limit, sparsity)
        return found if found.bytes <= limit else drafts.pruned(limit, 0.0, low=sparsity)

    def advance(self, session: Session, batch: int) -> None:
        """Correct, at the start of an epoch of quantized training, what the epoch before it has moved."""
        if not session.latent.quantized or not session.epoch_begins or session.stopped():
            return
        size = self.bytes(session)
        if self.target * (1 - _SLACK) <= size <= self.target * (1 - _ROOM / 2):
            return
        scores = session.rescore(batch)
        if scores is not None:
            with self.halting(session):
                found = self._filling(session, scores, self.target * (1 - _ROOM))
                self.apply(session, scores, found, batch, "corrected")

    def after_batch(self, session: Session) -> None:
        """After the last batch of an epoch: what validates fits the target."""
        if session.latent.quantized and session.epoch_ends:
            self._trim(session)

    def finish(self, session: Session) -> None:
        """The same where the end of the data was not known, and a last word."""
        if not session.latent.quantized:
            self.outcome = f"{self.label} is not met: the fit ended before weights were quantized"
            rank_zero_warn(self.outcome)
            return
        self._trim(session)
        size = self.bytes(session)
        apart = size / self.target - 1
        if size < self.target and self._whole(session.latent.plan()):
            self.outcome = f"target_size: {size:,} bytes with nothing pruned, {self.target:,} were allowed"
        elif -_ALLOWED <= apart <= 0:
            self.outcome = f"target_size: {size:,} of {self.target:,} bytes ({apart:+.2%})"
        else:
            self.outcome = f"target_size is missed: {size:,} bytes, wanted were {self.target:,} ({apart:+.2%})"
            rank_zero_warn(self.outcome)

    def _whole(self, plan: CompressionPlan) -> bool:
        """Whether nothing is pruned, and all have the largest width."""
        widths = plan.allocation.bits.values() if plan.allocation is not None else ()
        return not plan.mask.pruned and all(bool((bits == max(self.precision.bits)).all()) for bits in widths)

    def _trim(self, session: Session) -> None:
        """Prune what is too much, and leave widths and scales: nothing trains them any more."""
        if self.bytes(session) <= self.target:
            return
        batch = session.batch
        scores = session.rescore(batch)
        if scores is None:
            return
        plan = session.latent.plan()
        drafts = self.drafts(session, scores)
        self.apply(session, scores, drafts.trimmed(self.target, plan), batch, "corrected")
        session.batchnorm.refresh(again=True)
