"""The stage that says how far to prune when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.calibration import calibration_batches
from lightning_xai_compress.callbacks.clock import Moment, check_moment
from lightning_xai_compress.callbacks.pruning_settings import Pruning
from lightning_xai_compress.callbacks.scoring import RelevanceScoring
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Planned, Stage
from lightning_xai_compress.checks import check_names, check_number
from lightning_xai_compress.plan import Mask, ScoreMap
from lightning_xai_compress.pruning import (
    WORSE_THAN_RANDOM,
    Choice,
    Selection,
    SelectionRule,
    check_rule,
    matching,
    nonpositive_share,
    prunable,
    ramp,
    select_mask,
)
from lightning_xai_compress.relevance import Ends, known_names

__all__ = ["Pruning", "RelevancePruning"]

_PLANNED_AGAIN = 0.75  # of the steps towards a size
_SPENT = 0.01  # of the largest learning rate so far: too little to heal what was pruned


class RelevancePruning(CompressionCallback, Stage):
    """Prune progressively by relevance: a ramp of re-scored steps over a ranking of the weights.

    Without `RelevanceScoring` (or with its defaults) each step scores for itself.

    Args:
        sparsity: Share of the compressible weights to be zero at the end, in [0, 1). None, with "nonpositive" only:
            as many as the first scoring finds non-positive, or until the set is exhausted; positives never go.
        selection: By default "nonpositive" where the criterion gives a sign, otherwise "least". "nonpositive": weights
            with relevance <= 0 first, smallest score first; where the set runs out
            before `sparsity` is met, positive ones follow, least first, and the report says how many. "least":
            smallest score first whatever the sign. "literal": all weights with relevance <= 0 at once at `start`, and
            no others; for reproduction, since this is worse than random pruning.
        start: When the ramp begins: epochs (whole number), a share of the fit, or steps ("1500 steps").
        end: When it is done.
        exclude: Shell-style patterns of layers to leave alone.
        pruning: How patiently, and what stays.

    Attributes:
        choice: What goes into `select_mask`, once a fit has begun.

    Raises:
        ValueError: A setting out of range; (in fit) a ramp that ends before it begins or after the fit, a pattern that
            matches no layer, or a sparsity that leaves no room for what must stay.
    """

    rank: ClassVar[int] = 2
    needs_scores: ClassVar[bool] = True

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        selection: SelectionRule | None = None,
        start: Moment = 0.25,
        end: Moment = 0.6,
        exclude: Sequence[str] = (),
        pruning: Pruning | None = None,
    ) -> None:
        super().__init__()
        if selection is not None:
            check_rule(selection)
        sparsity = None if sparsity is None else check_number("sparsity", sparsity)
        if sparsity is not None and not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
        if sparsity is not None and selection == "literal":
            raise ValueError(
                f"selection='literal' prunes the whole set, and no sparsity: leave sparsity={sparsity} out"
            )
        self.sparsity = sparsity
        self.selection = selection
        self._rule: SelectionRule = selection or "nonpositive"
        self.start = check_moment("start of pruning", start)
        self.end = check_moment("end of pruning", end)
        self.exclude = check_names("exclude", exclude)
        if pruning is not None and not isinstance(pruning, Pruning):
            raise ValueError(f"pruning must be a Pruning(...), got {pruning!r}")
        self.pruning = pruning or Pruning()
        levels = self.pruning.levels
        if levels and sparsity is not None and levels[-1] != sparsity:
            raise ValueError(f"the last milestone has sparsity {levels[-1]}, but sparsity={sparsity}: make them equal")
        self.choice = self.pruning.choice()
        self._budget: Any = None
        self._ramp = ramp(self.pruning.schedule, levels)
        self._positions: list[int] = []
        self._ends: Ends | None = None
        self._done = 0
        self._scored = 0
        self._target = sparsity
        self._replanned = False
        self._peak = 0.0
        self.positives = 0
        self.exhausted = False

    def __getstate__(self) -> dict[str, Any]:
        """Without another stage of the fit that was, as in the base."""
        return {**super().__getstate__(), "_budget": None}

    def stages(self) -> list[Stage]:
        """This one."""
        return [self]

    def begin(self, session: Session) -> None:
        """Lay the steps out over the fit, and find what is never pruned."""
        self._budget = session.budget
        if self._open and self.selection == "least":
            raise ValueError("selection='least' needs a sparsity: only 'nonpositive' has an end of its own")
        self._positions = self._lay_out(session)
        scoring, every = session.stage(RelevanceScoring), self.pruning.rescore_every
        epochs = scoring.relevance_epochs if scoring is not None else None
        if isinstance(epochs, tuple) and session.clock.batch_of(epochs[0]) > self._positions[0]:
            raise ValueError(
                f"relevance_epochs={list(epochs)} begins after pruning does (epoch "
                f"{session.clock.label(self._positions[0])}): the first pruning step would have no scores"
            )
        if epochs is not None and every > 1:
            raise ValueError(f"relevance_epochs and rescore_every={every} both say when weights are scored: give one")
        self._scores_itself = epochs is None
        self._keeps = every > 1 and not self.complete
        if self._keeps:
            session.keeps_scores = session.holds_scores = True
        criterion, statistics = session.scorer.criterion, session.scorer.settings.statistics
        self._brings_statistics = callable(criterion) or "." in criterion
        if not self._brings_statistics:
            self._check_error("standard_error" in statistics, "add Scoring(statistics=('rms', 'standard_error'))")
        session.fresh_batchnorm = self.pruning.fresh_batchnorm
        self.choice = self._choice(session)
        if self.selection == "literal" and not self.complete:
            rank_zero_warn(WORSE_THAN_RANDOM)

    def _check_error(self, known: bool, remedy: str) -> None:
        if self.pruning.confidence is not None and not known:
            raise ValueError(f"confidence={self.pruning.confidence} needs a standard error: {remedy}")

    def _lay_out(self, session: Session) -> list[int]:
        """Batches at which a step is due."""
        clock, settings = session.clock, self.pruning
        first = clock.check("start of pruning", self.start)
        last = clock.check("end of pruning", self.end, last=True)
        if last < first:
            raise ValueError(f"pruning ends (at {self.end}) before it starts (at {self.start})")
        if settings.schedule == "one_shot" or self.selection == "literal":
            return [first]
        if settings.schedule != "stepwise":
            return [first + (last - first) * step // settings.steps for step in range(settings.steps)]
        positions = [clock.check("milestone", moment) for moment, _ in settings.milestones]
        if positions != sorted(positions):
            raise ValueError(f"milestones must follow each other in time, got {settings.milestones}")
        if positions[0] < first or positions[-1] > last:
            raise ValueError(
                f"milestones={settings.milestones} reach beyond pruning, which starts at {self.start} (epoch "
                f"{clock.label(first)}) and ends at {self.end} (epoch {clock.label(last)})"
            )
        return positions

    def _choice(self, session: Session) -> Choice:
        """The settings, with names of this model."""
        if self._ends is None:
            self._ends = Ends.of(
                session.module,
                session.latent.parameters,
                lambda: next(calibration_batches(session.trainer, samples=1, seed=session.scorer.settings.seed)),
                agreed=session.processes.shared,
            )
        names = known_names(session.module, session.latent.parameters)
        protected = matching(names, self.pruning.protect)
        if self.pruning.protect_ends:
            protected |= {self._ends.first, self._ends.last}
        if protected:
            rank_zero_info(f"[compression] never pruned: {', '.join(sorted(protected))}")
        outputs = {self._ends.last: self._ends.axis}
        return replace(self.pruning.choice(), protect=tuple(sorted(protected)), outputs=outputs)

    @property
    def _open(self) -> bool:
        """Whether the non-positive set decides where to end."""
        return self.sparsity is None and self._budget is None

    @property
    def _led(self) -> bool:
        """Whether a budget prunes by the settings of this stage."""
        return self._budget is not None and bool(self._budget.leads)

    @property
    def complete(self) -> bool:
        """Whether the last step is taken."""
        return self._led or self._target == 0 or self._done >= len(self._positions)

    def check_scores(self, scores: ScoreMap) -> None:
        """Only weights of known relevance can go, and only signed relevance is non-positive."""
        self._rule = self.selection or ("nonpositive" if scores.signed and self._budget is None else "least")
        if not scores.signed and (self._rule != "least" or self._open):
            raise ValueError(
                f"selection={self.selection or 'nonpositive'!r}, and pruning without a sparsity, need scores with a "
                "sign, which this criterion does not give: set a sparsity and selection='least', or use criterion='lrp'"
            )
        if self._rule == "least" and self.choice.confidence is not None:
            raise ValueError(
                f"confidence={self.choice.confidence} is of the sign of relevance: use selection='nonpositive', or "
                "leave it out"
            )
        if self._brings_statistics:
            self._check_error(bool(scores.standard_error), "let your criterion return a ScoreMap that has one")
        if self._target != 0:
            self._check_room(scores)

    def _check_room(self, scores: ScoreMap) -> None:
        sizes = {name: tensor.numel() for name, tensor in scores.score.items()}
        total = sum(sizes.values())
        known = total - sum(int(tensor.isnan().sum()) for tensor in scores.score.values())
        if self.sparsity is not None and self.sparsity > known / total:
            raise ValueError(
                f"sparsity={self.sparsity} cannot be met: relevance reaches only {known / total:.1%} of the "
                f"compressible weights (not {', '.join(scores.unknown[:4])}); lower sparsity, or exclude those layers"
            )
        room = prunable(scores, self.choice)
        if room and (self.sparsity is None or min(round(self.sparsity * total), total - 1) <= room):
            return
        kept = sum(sizes[name] for name in self.choice.protect)
        raise ValueError(
            f"{'pruning' if self.sparsity is None else f'sparsity={self.sparsity}'} cannot be met: only {room:,} of "
            f"the {total:,} compressible weights ({room / total:.2%}) can go, since protected layers keep {kept:,}, "
            f"unknown relevance {total - known:,}, and floors (floor={self.choice.floor}, but at least a weight a "
            "layer and one an output) the rest. Lower sparsity or floor, or protect fewer layers"
        )

    def phases(self) -> list[tuple[int, str]]:
        """The steps of the ramp."""
        return [(position, "pruning") for position in self._positions] if self._target != 0 and not self._led else []

    def planned(self, batch: int) -> Planned:
        """The ramp; where the non-positive set decides, half of the weights, which is what it usually holds."""
        if self._led:
            return Planned()
        expected = 0.5 if self._budget is None else self._budget.expected
        final = expected if self._target is None else self._target
        done = sum(position <= batch for position in self._positions)
        return Planned(self._ramp(done / len(self._positions), final=final), open=self._target is None and done > 0)

    def advance(self, session: Session, batch: int) -> None:
        """Take the latest step that is due; several at once are one."""
        if self.complete:
            return
        rates = (group["lr"] for optimizer in session.trainer.optimizers for group in optimizer.param_groups)
        rate = max(map(float, rates), default=0.0)
        self._peak = max(self._peak, rate)
        due = sum(position <= batch for position in self._positions)
        if due <= self._done or session.stopped():
            return
        session.start(batch)
        scores, every = session.scores, self.pruning.rescore_every
        if scores is None or (self._scores_itself and (due - 1) // every > (self._scored - 1) // every):
            scores = session.rescore(batch)
            self._scored = due
        if scores is None:
            return
        self._done = due
        self._prune(session, scores, batch)
        if self.complete:
            self._warn_if_spent(session, rate)
            if self._keeps:
                session.keeps_scores = session.holds_scores = False

    def select(self, scores: ScoreMap, sparsity: float, previous: Mask | None) -> Selection:
        """What a sparsity takes, by the settings of this stage."""
        return select_mask(
            scores,
            sparsity,
            selection="least" if self._rule == "least" else "nonpositive",
            previous=previous,
            positives=not self._open,
            choice=self.choice,
        )

    def _prune(self, session: Session, scores: ScoreMap, batch: int) -> None:
        late = self._done >= _PLANNED_AGAIN * len(self._positions)
        if self._target is None or (self._budget is not None and late and not self._replanned):
            self._replanned = late  # by then weights are nearly those that will be quantized
            self._target = (
                min(nonpositive_share(scores, self.choice.confidence), 0.999)
                if self._open
                else self._budget.planned_sparsity(session, scores)
            )
        sparsity = self._ramp(self._done / len(self._positions), final=self._target)
        selection = self.select(scores, sparsity, session.latent.mask())
        session.latent.apply_mask(selection.mask)
        ran_out = self._rule == "nonpositive" and selection.positive and not self.positives
        self.positives += selection.positive
        if selection.exhausted and self._open:
            self.exhausted = True
            self._done = len(self._positions)  # the set is empty: nothing follows
        remark = ", the non-positive set is exhausted" if self.exhausted else ""
        session.record(
            "pruned",
            batch,
            f"pruned to {selection.mask.sparsity:.1%} ({selection.removed} weights, {selection.positive} of positive "
            f"relevance{', since the non-positive set ran out' if ran_out else remark})",
            sparsity=selection.mask.sparsity,
            removed=selection.removed,
            positive=selection.positive,
        )

    def _warn_if_spent(self, session: Session, rate: float) -> None:
        """Pruning is healed by training, and training needs a learning rate."""
        if rate < _SPENT * self._peak:
            rank_zero_warn(
                f"at the last pruning step (epoch {session.epoch():.2f}) the learning rate has decayed to {rate:.2g}, "
                f"below {_SPENT:.0%} of its peak {self._peak:.2g}: what was pruned can hardly heal. End pruning "
                f"earlier (it ends at {self.end}), or let the learning rate fall later"
            )

    def state(self) -> dict[str, Any]:
        """Steps taken and scored, target, positives and the largest learning rate so far, and the ends of the model."""
        return {
            "done": self._done,
            "scored": self._scored,
            "target": self._target,
            "replanned": self._replanned,
            "positives": self.positives,
            "exhausted": self.exhausted,
            "peak": self._peak,
            "ends": self._ends.state() if self._ends is not None else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        self._done = state.get("done", 0)
        self._scored = state.get("scored", 0)
        self._target = state.get("target", self.sparsity)
        self._replanned = state.get("replanned", False)
        self.positives = state.get("positives", 0)
        self.exhausted = state.get("exhausted", False)
        self._peak = state.get("peak", 0.0)
        ends = state.get("ends")
        self._ends = Ends(**ends) if ends else None
