"""The stage that says when relevance is computed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.calibration import training_batch_size
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Scoring, Stage
from lightning_xai_compress.checks import check_number
from lightning_xai_compress.criteria import check_criterion, criterion_name
from lightning_xai_compress.plan import ScoreMap
from lightning_xai_compress.relevance import LEAST_BATCHES

__all__ = ["RelevanceScoring"]


class RelevanceScoring(CompressionCallback, Stage):
    """Compute per-weight LRP relevance, or another criterion, at chosen epochs.

    Args:
        relevance_epochs: Epochs at whose start relevance is computed: a list in rising order, or every n epochs. By
            default right before each use: at every pruning step and before bits are allocated; without another
            stage, at every epoch.
        criterion: "lrp", "deeplift", "taylor", "fisher", "wanda", "magnitude", "lamp", "random", or a function of your
            own, see `score`; all stages of the fit go by it.
        scoring: How, and on how many samples.

    Attributes:
        scores: The latest scores, where `relevance_epochs` is given or no other stage is there; else None, since each
            use scores anew and no step of the training shall carry them.

    Raises:
        ValueError: Epochs that are negative, not in rising order or (in fit) past its end.
    """

    rank: ClassVar[int] = 0
    needs_scores: ClassVar[bool] = True

    def __init__(
        self,
        *,
        relevance_epochs: int | list[int] | None = None,
        criterion: str | Callable[..., Any] = "lrp",
        scoring: Scoring | None = None,
    ) -> None:
        super().__init__()
        check_criterion(criterion)
        self.criterion = criterion
        self.relevance_epochs = check_epochs(relevance_epochs)
        if scoring is not None and not isinstance(scoring, Scoring):
            raise ValueError(f"scoring must be a Scoring(...), got {scoring!r}")
        self.scoring = scoring or Scoring()
        self._rehearsal = False
        self._done = -1
        self._fit: Session | None = None  # whichever callback leads it

    def stages(self) -> list[Stage]:
        """This one."""
        return [self]

    @property
    def scores(self) -> ScoreMap | None:
        """The latest scores of this fit; None where every stage scores for itself and they were used at once."""
        return self._fit.scores if self._fit is not None else None

    def begin(self, session: Session) -> None:
        """Hand the settings to the session; a list of epochs must end before the fit does."""
        self._fit = session
        epochs, length = self.relevance_epochs, session.clock.epoch_of(session.clock.batches)
        self._rehearsal = session.clock.rehearsal
        if isinstance(epochs, tuple) and length is not None and epochs[-1] >= length and not self._rehearsal:
            raise ValueError(
                f"relevance_epochs={list(epochs)} reaches past the end of the fit, which has {length:g} epochs, "
                "counted from 0"
            )
        batches = self.scoring.samples // training_batch_size(session.trainer)
        if "standard_error" in self.scoring.statistics and batches < LEAST_BATCHES:
            raise ValueError(
                f"statistics with 'standard_error' need at least {LEAST_BATCHES} batches, but "
                f"samples={self.scoring.samples} are {batches} of this loader's: raise samples in Scoring(...)"
            )
        session.scorer.settings, session.scorer.criterion = self.scoring, self.criterion
        alone = not any(stage.needs_scores and stage is not self for stage in session.stages)
        self._every = 1 if alone and self.relevance_epochs is None else 0
        session.keeps_scores = self.relevance_epochs is not None
        session.holds_scores = session.keeps_scores or alone

    def advance(self, session: Session, batch: int) -> None:
        """Score at the start of a chosen epoch, once."""
        epoch = session.trainer.current_epoch
        if not session.epoch_begins or epoch == self._done or not self._chosen(epoch):
            return
        self._done = epoch
        scores = session.rescore(batch)
        if scores is not None:
            message = f"{criterion_name(self.criterion)} scores from {scores.samples} samples"
            if scores.left_out:
                message += f" ({scores.left_out} logits <= 0 left out)"
            session.record("scored", batch, message, samples=scores.samples)

    def _chosen(self, epoch: int) -> bool:
        if self._every or (self._rehearsal and self.relevance_epochs is not None):
            return True
        if isinstance(self.relevance_epochs, int):
            return epoch % self.relevance_epochs == 0
        return self.relevance_epochs is not None and epoch in self.relevance_epochs

    def __getstate__(self) -> dict[str, Any]:
        """Without the fit that was, as in the base."""
        return {**super().__getstate__(), "_fit": None}

    def state(self) -> dict[str, Any]:
        """The last epoch that was scored."""
        return {"done": self._done}

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        self._done = state.get("done", -1)


def check_epochs(epochs: int | list[int] | None) -> int | tuple[int, ...] | None:
    """Validate `relevance_epochs`.

    Raises:
        ValueError: Not positive, empty, negative, or not in rising order.
    """
    if epochs is None:
        return None
    if not isinstance(epochs, list | tuple):
        every = int(check_number("relevance_epochs as a number", epochs, whole=True))
        if every < 1:
            raise ValueError(f"relevance_epochs as a number means every n epochs and must be >= 1, got {every}")
        return every
    chosen = tuple(check_number("each of relevance_epochs", epoch, whole=True) for epoch in epochs)
    if not chosen or min(chosen) < 0:
        raise ValueError(f"relevance_epochs must be a list of epochs >= 0, got {epochs!r}")
    if any(later <= earlier for earlier, later in pairwise(chosen)):
        raise ValueError(f"relevance_epochs must be in rising order, got {epochs}")
    return chosen
