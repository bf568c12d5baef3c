"""The stage that compresses step by step as far as a metric allows, and goes back where it went too far."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_xai_compress.budget import CLOSE, VALUE_BITS, points_lost
from lightning_xai_compress.callbacks.best import Best, fill
from lightning_xai_compress.callbacks.budget import Budget
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Planned
from lightning_xai_compress.checks import check_number

__all__ = ["AccuracyBudget"]

_FIRST = 0.12  # of the dense bytes: what the first step asks for; some pruning and about three bits are free
_RATIO = 0.7  # of the bytes that the next step asks for
_FINEST = 0.97  # ratio beyond which steps grow no finer
_CLOSE = 0.02  # of the bytes asked for: a round may ask for a little too much
_PATIENCE = 3  # validations that a state may need to heal
_SEARCH = 0.75  # of the fit from where compression begins; afterwards what was found trains on


class AccuracyBudget(Budget):
    """Compress as far as a validation metric allows.

    Each validation ends a round. Where the metric has lost no more than `max_drop` since compression began, the state
    is kept and the next round asks for fewer bytes; where it has lost more, three more rounds may heal it, then the
    last state that was kept comes back, and steps get smaller. In the last quarter of the fit the smallest state that
    kept the budget trains on, without further steps, and the fit ends with the latest of its validations that kept it.
    Rounds are as long as validations are apart: `Trainer(val_check_interval=0.25)` gives four an epoch. A learning
    rate at which the dense model would keep its metric lets rounds be judged fairly.

    To be used beside `RelevancePruning` and `MixedPrecision`, whose settings it goes by, and `CompressedExport`,
    whose metric and mode it takes.

    Args:
        max_drop: What the metric may lose, in points: hundredths where the dense value lies in [-1, 1], such as an
            accuracy as a share, else units of the metric.

    Raises:
        ValueError: Not positive; (in fit) without metric, mode or validation, or beside a sparsity.
    """

    leads: ClassVar[bool] = True

    def __init__(self, max_drop: float) -> None:
        super().__init__()
        self.max_drop = check_number("max_drop", max_drop)
        if self.max_drop <= 0:
            raise ValueError(f"max_drop must be positive (points that the metric may lose), got {max_drop}")
        self._reference: float | None = None  # metric when compression began
        self._size = 0.0
        self._ratio = _RATIO
        self._waited = 0
        self._verdict: bool | None = None  # of the latest validation, until it is acted on
        self._present = -1  # step at which the kept weights are those of the module
        self._kept = Best("min")
        self._positives = 0  # of what was pruned in that state
        self._least = math.inf  # points lost by the kept state
        self._settled = False  # the search for a smaller one is over
        self._tried: frozenset[str] = frozenset()  # logged metrics of the trial validation, where there was one
        self._missed = False

    @property
    def label(self) -> str:
        """The setting."""
        return f"max_drop={self.max_drop}"

    def begin(self, session: Session) -> None:
        """See that there is something to judge by."""
        super().begin(session)
        if self.export is None or not self.export.accuracy.label:
            raise ValueError(f"{self.label} needs metric=: what may drop")
        if self.export.mode is None:
            raise ValueError(
                f"{self.label} needs mode='max' or 'min': {self.export.accuracy.label} does not tell which is better"
            )
        if not sum(session.trainer.num_val_batches):
            raise ValueError(f"{self.label} is judged at validations, but this fit has none: give a val_dataloader")
        if self._tried and not self.export.accuracy.measures and self.export.accuracy.label not in self._tried:
            raise ValueError(
                f"{self.label} is judged by metric={self.export.accuracy.label!r}, which the trial validation before "
                f"training did not log; logged were {sorted(self._tried)}. Where the module leaves it out of that "
                "trial on purpose: Trainer(num_sanity_val_steps=0)"
            )
        if session.averaging.present:
            raise ValueError(
                f"{self.label} cannot go back under a callback that averages weights: leave one of them out"
            )
        self._first = session.clock.check("start of pruning", self.pruning.start)

    def check_settings(self, trainer: Trainer) -> None:
        """Forget the trial of an earlier fit."""
        self._tried = frozenset()

    def tried(self, names: frozenset[str]) -> None:
        """Remember, for a metric that never appears."""
        self._tried = names

    def planned(self, batch: int) -> Planned:
        """Nobody knows."""
        return Planned(budget=f"at most {self.max_drop:g} points lost") if batch >= self._first else Planned()

    def phases(self) -> list[tuple[int, str]]:
        """Where it begins."""
        return [(self._first, "compression")]

    @property
    def complete(self) -> bool:
        """Whether the weights are compressed: every state from then on may be the last."""
        return self._reference is not None

    def advance(self, session: Session, batch: int) -> None:
        """Act on the latest validation."""
        if session.stopped():
            return
        if self._reference is None:
            if batch >= self._first and not self._waits_for_metric(session):
                self._begin(session, batch)
            return
        if not self._settled and batch >= self._first + _SEARCH * (session.clock.batches - self._first):
            self._settle(session, batch)
        if self._verdict is None or self._settled:
            return
        within, self._verdict = self._verdict, None
        if within:
            self._waited = 0
            self._ratio = max(_RATIO, self._ratio**2)
            self._size = self._kept.bytes
        elif self._waited < _PATIENCE or self._least > self.max_drop:  # the latter: there is nothing to go back to
            self._waited += 1
            return
        else:
            self._waited = 0
            self._ratio = min(math.sqrt(self._ratio), _FINEST)
            self._go_back(session, batch)
        self._shrink(session, batch)

    def _settle(self, session: Session, batch: int) -> None:
        """Let the smallest state within the budget train to the end; where there is none, the one that is there."""
        self._settled = True
        if self._least <= self.max_drop and not self._holds_kept(session):
            self._go_back(session, batch)

    def _holds_kept(self, session: Session) -> bool:
        """Whether the module has the kept weights: nothing has changed them since they were measured."""
        return self._present == session.trainer.global_step

    def _waits_for_metric(self, session: Session) -> bool:
        """A named metric is known from the first validation on."""
        assert self.export is not None
        return not self.export.accuracy.measures and not self.export.accuracy.logged

    def _begin(self, session: Session, batch: int) -> None:
        assert self.export is not None
        session.start(batch)
        self._reference = self.export.dense_accuracy
        self._size = self.dense * _FIRST / self._ratio
        self._shrink(session, batch)

    def _shrink(self, session: Session, batch: int) -> None:
        """Ask for fewer bytes."""
        scores = session.rescore(batch)
        if scores is None:
            return
        wanted = self._size * self._ratio
        low = session.latent.mask().sparsity
        with self.halting(session):
            found = self.drafts(session, scores).pruned(wanted, VALUE_BITS, low=low, close=_CLOSE)
            self._present = -1
            self.apply(session, scores, found, batch, "compressed")
            self._size = wanted

    def lost(self, value: float) -> float:
        """Points lost since compression began; negative where the metric is better."""
        assert self._reference is not None
        assert self.export is not None
        return points_lost(self._reference, value, self.export.mode or "max")

    def measured(self, session: Session, value: float | None) -> None:
        """Judge the weights that were validated, and keep them where they are the smallest within the budget."""
        super().measured(session, value)
        if not self._missed and self._waits_for_metric(session):
            self._missed = True
            assert self.export is not None
            rank_zero_warn(
                f"{self.label} waits for metric={self.export.accuracy.label!r}, which the validation of epoch "
                f"{session.epoch_after_batch():.2f} did not log: nothing is compressed before it is there"
            )
        if self._reference is None or value is None:
            return
        lost, size = self.lost(value), self.path[-1].bytes
        self._verdict = lost <= self.max_drop
        smaller = size < self._kept.bytes * (1 - CLOSE)
        first = self._least > self.max_drop  # nothing has kept the budget so far
        better = size <= self._kept.bytes * (1 + CLOSE) and lost < self._least
        later = self._settled  # the same state, which has trained longer
        if (self._verdict and (first or smaller or better or later)) or (first and lost < self._least):
            self._least = lost
            self._kept.keep(value, session.epoch_after_batch(), session.module, session.averaging.latent_state())
            self._kept.bytes, self._positives = size, self.pruning.positives
            self._present = session.trainer.global_step

    def _go_back(self, session: Session, batch: int) -> None:
        session.latent.settle()
        fill(session.module, self._kept.weights)
        session.latent.load_state_dict(self._kept.latent)
        self._size, self.pruning.positives = self._kept.bytes, self._positives
        self._present = session.trainer.global_step
        session.record(
            "rolled back",
            batch,
            f"rolled back to the {self._kept.bytes:,} bytes of epoch {self._kept.epoch:.2f}",
            bytes=self._kept.bytes,
        )

    def finish(self, session: Session) -> None:
        """End at the smallest state that kept the budget, or else at the best."""
        value = self._kept.value
        if self._reference is None or value is None:
            self.outcome = f"{self.label} was not judged: no validation measured the metric after compression began"
            rank_zero_warn(self.outcome)
            return
        assert self.export is not None
        if not self._holds_kept(session):
            self._go_back(session, session.batch)
            self.export.accuracy.restate(session, value, self._kept.epoch)
        if self._least <= self.max_drop:
            self.outcome = f"max_drop: {self._least:+.2f} of {self.max_drop:g} points lost, {self._kept.bytes:,} bytes"
            return
        self.outcome = (
            f"max_drop={self.max_drop:g} is missed by {self._least - self.max_drop:.2f} points: the best compressed "
            f"state lost {self._least:.2f} at {self._kept.bytes:,} bytes. Train longer, validate more often, or lower "
            "the learning rate"
        )
        rank_zero_warn(self.outcome)

    def state(self) -> dict[str, Any]:
        """All that the next round goes by, the kept weights included."""
        own = {
            "reference": self._reference,
            "size": self._size,
            "ratio": self._ratio,
            "waited": self._waited,
            "verdict": self._verdict,
            "least": self._least,
            "settled": self._settled,
            "present": self._present,
            "positives": self._positives,
            "kept": self._kept.state(),
        }
        return {**super().state(), "rounds": own}

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        super().load(state)
        own = state.get("rounds", {})
        self._reference, self._size, self._ratio = own.get("reference"), own.get("size", 0.0), own.get("ratio", _RATIO)
        self._waited, self._verdict = own.get("waited", 0), own.get("verdict")
        self._least, self._positives = own.get("least", math.inf), own.get("positives", 0)
        self._settled, self._present = own.get("settled", False), own.get("present", -1)
        self._kept = Best("min")
        self._kept.load(own.get("kept", {}))
