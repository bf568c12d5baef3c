"""The stage that says how far to prune when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.clock import Moment, check_moment
from lightning_xai_compress.callbacks.scoring import RelevanceScoring
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Planned, Stage
from lightning_xai_compress.checks import check_names, check_number
from lightning_xai_compress.plan import ScoreMap
from lightning_xai_compress.pruning import SelectionRule, cubic, nonpositive_share, select_mask

__all__ = ["Pruning", "RelevancePruning"]


@dataclass(frozen=True)
class Pruning:
    """How patiently to prune.

    Args:
        steps: Number of pruning steps over the ramp, >= 1, each followed by training. Many small steps let the
            non-positive set refill.
    """

    steps: int = 24

    def __post_init__(self) -> None:
        check_number("pruning steps", self.steps, whole=True)
        if self.steps < 1:
            raise ValueError(f"pruning steps must be >= 1, got {self.steps}")


class RelevancePruning(CompressionCallback, Stage):
    """Prune progressively by relevance: a cubic ramp of re-scored steps over a global ranking.

    Without `RelevanceScoring` (or with its defaults) each step scores for itself.

    Args:
        sparsity: Share of the compressible weights to be zero at the end, in [0, 1). None, with "nonpositive" only:
            as many as the first scoring finds non-positive, or until the set is exhausted; positives never go.
        selection: By default "nonpositive" where the criterion gives a sign, otherwise "least". "nonpositive": weights
            with relevance <= 0 first, smallest score first; where the set runs out
            before `sparsity` is met, positive ones follow, least first, and the report says how many. "least":
            smallest score first whatever the sign.
        start: When the ramp begins: epochs (whole number), a share of the fit, or steps ("1500 steps").
        end: When it is done.
        exclude: Shell-style patterns of layers to leave alone.
        pruning: How patiently.

    Raises:
        ValueError: A setting out of range; (in fit) a ramp that ends before it begins or after the fit.
    """

    rank: ClassVar[int] = 1
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
        if selection not in (None, "nonpositive", "least"):
            raise ValueError(f"selection must be 'nonpositive' or 'least', got {selection!r}")
        sparsity = None if sparsity is None else check_number("sparsity", sparsity)
        if sparsity is not None and not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
        if sparsity is None and selection == "least":
            raise ValueError(f"selection={selection!r} needs a sparsity: only 'nonpositive' has an end of its own")
        self.sparsity = sparsity
        self.selection = selection
        self._rule: SelectionRule = selection or "nonpositive"
        self.start = check_moment("start of pruning", start)
        self.end = check_moment("end of pruning", end)
        self.exclude = check_names("exclude", exclude)
        if pruning is not None and not isinstance(pruning, Pruning):
            raise ValueError(f"pruning must be a Pruning(...), got {pruning!r}")
        self.pruning = pruning or Pruning()
        self._positions: list[int] = []
        self._done = 0
        self._target = sparsity
        self.positives = 0
        self.exhausted = False

    def stages(self) -> list[Stage]:
        """This one."""
        return [self]

    def begin(self, session: Session) -> None:
        """Lay the steps out over the fit."""
        clock = session.clock
        first = clock.check("start of pruning", self.start)
        last = clock.check("end of pruning", self.end, last=True)
        if last < first:
            raise ValueError(f"pruning ends (at {self.end}) before it starts (at {self.start})")
        steps = self.pruning.steps
        self._positions = [first + (last - first) * step // steps for step in range(steps)]
        scoring = session.stage(RelevanceScoring)
        epochs = scoring.relevance_epochs if scoring is not None else None
        if isinstance(epochs, tuple) and clock.batch_of(epochs[0]) > first:
            raise ValueError(
                f"relevance_epochs={list(epochs)} begins after pruning does (epoch {clock.label(first)}): the "
                "first pruning step would have no scores"
            )
        self._scores_itself = epochs is None

    @property
    def complete(self) -> bool:
        """Whether the last step is taken."""
        return self._target == 0 or self._done >= len(self._positions)

    def check_scores(self, scores: ScoreMap) -> None:
        """Only weights of known relevance can go, and only signed relevance is non-positive."""
        self._rule = self.selection or ("nonpositive" if scores.signed else "least")
        if not scores.signed and (self._rule == "nonpositive" or self.sparsity is None):
            raise ValueError(
                "selection='nonpositive', and pruning without a sparsity, need scores with a sign, which this "
                "criterion does not give: set a sparsity and selection='least', or use criterion='lrp'"
            )
        total = sum(tensor.numel() for tensor in scores.score.values())
        known = 1 - sum(int(tensor.isnan().sum()) for tensor in scores.score.values()) / total
        if self.sparsity is not None and self.sparsity > known:
            raise ValueError(
                f"sparsity={self.sparsity} cannot be met: relevance reaches only {known:.1%} of the compressible "
                f"weights (not {', '.join(scores.unknown[:4])}); lower sparsity, or exclude those layers"
            )

    def phases(self) -> list[tuple[int, str]]:
        """The steps of the ramp."""
        return [(position, "pruning") for position in self._positions] if self._target != 0 else []

    def planned(self, batch: int) -> Planned:
        """The ramp; where the non-positive set decides, half of the weights, which is what it usually holds."""
        final = 0.5 if self._target is None else self._target
        done = sum(position <= batch for position in self._positions)
        return Planned(cubic(done / len(self._positions), final=final), open=self.sparsity is None and done > 0)

    def advance(self, session: Session, batch: int) -> None:
        """Take the latest step that is due; several at once are one."""
        due = sum(position <= batch for position in self._positions)
        if due <= self._done or self._target == 0 or session.stopped():
            return
        session.start(batch)
        scores = session.scores
        if self._scores_itself or scores is None:
            scores = session.rescore(batch)
        if scores is None:
            return
        self._done = due
        self._prune(session, scores, batch)

    def _prune(self, session: Session, scores: ScoreMap, batch: int) -> None:
        if self._target is None:
            self._target = min(nonpositive_share(scores), 0.999)
        selection = select_mask(
            scores,
            cubic(self._done / len(self._positions), final=self._target),
            selection=self._rule,
            previous=session.latent.mask(),
            positives=self.sparsity is not None,
        )
        session.latent.apply_mask(selection.mask)
        self.positives += selection.positive
        if selection.exhausted and self.sparsity is None:
            self.exhausted = True
            self._done = len(self._positions)  # the set is empty: nothing follows
        session.record(
            "pruned",
            batch,
            f"pruned to {selection.mask.sparsity:.1%} ({selection.removed} weights, {selection.positive} of positive "
            f"relevance{', the non-positive set is exhausted' if self.exhausted else ''})",
            sparsity=selection.mask.sparsity,
            removed=selection.removed,
            positive=selection.positive,
        )

    def state(self) -> dict[str, Any]:
        """Steps taken, target and positives so far."""
        return {"done": self._done, "target": self._target, "positives": self.positives, "exhausted": self.exhausted}

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        self._done = state.get("done", 0)
        self._target = state.get("target", self.sparsity)
        self.positives = state.get("positives", 0)
        self.exhausted = state.get("exhausted", False)
