"""What the report calls accuracy: a metric measured on the validation data, or one that the module logs."""

from __future__ import annotations

from itertools import islice
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_xai_compress.callbacks.calibration import validation_batches
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.report import evaluate

__all__ = ["Accuracy"]


class Accuracy:
    """Reads one number at the moments that matter.

    Args:
        metric: A torchmetrics metric, or the name of one that the module logs; None: nothing is known.

    Raises:
        ValueError: Anything else.
    """

    def __init__(self, metric: Metric | str | None) -> None:
        if metric is not None and not (isinstance(metric, Metric) or (isinstance(metric, str) and metric)):
            raise ValueError(
                "metric must be the name of one that the module logs, or a torchmetrics metric that gives one number "
                f"(an object, such as MulticlassAccuracy(10), no class and no collection), got {metric!r}"
            )
        self.metric = metric
        self.logged: dict[str, float] = {}
        self._earlier: Any = None
        self._fresh = False

    @property
    def label(self) -> str:
        """What the metric is called; "" for none."""
        if self.metric is None:
            return ""
        return self.metric if isinstance(self.metric, str) else type(self.metric).__name__

    @property
    def name(self) -> str:
        """For the report, with the data; "" for none."""
        return f"{self.label} (validation data)" if self.label else ""

    @property
    def measures(self) -> bool:
        """Whether it can be measured at any moment."""
        return isinstance(self.metric, Metric)

    def begin(self, session: Session) -> None:
        """Refuse, before training, a metric that cannot be measured.

        Raises:
            ValueError: No validation data, or the metric does not take what the model gives.
        """
        if not self.measures:
            return
        if session.trainer.val_dataloaders is None:
            raise ValueError("metric= is measured on validation data, but this fit has none: give a val_dataloader")
        try:
            self.measure(session, batches=1)
        except (RelevanceError, ValueError, RuntimeError) as error:
            raise ValueError(f"metric= cannot be measured; name one that the module logs instead. {error}") from error

    def measure(self, session: Session, *, batches: int | None = None, model: nn.Module | None = None) -> float | None:
        """The torchmetrics metric now, of the module or of another model; None where there is none."""
        if not isinstance(self.metric, Metric):
            return None
        trainer = session.trainer
        validating = trainer.validating
        trainer.validating = True  # the batch hooks ask
        try:
            with isolate_rng(), trainer.precision_plugin.forward_context():
                return evaluate(model or session.module, islice(validation_batches(trainer), batches), self.metric)
        finally:
            if not validating:
                trainer.training = True

    def before_compression(self, session: Session, epoch: float) -> tuple[float | None, float]:
        """The number of the dense model, and the epoch that it is of."""
        if not isinstance(self.metric, str):
            return self.measure(session), epoch
        if not self.logged:
            rank_zero_warn(
                f"metric={self.metric!r} was not logged by a validation before compression begins, so the dense "
                "accuracy is unknown: let warmup be longer, or give a torchmetrics metric"
            )
        return self.logged.get("value"), self.logged.get("epoch", epoch)

    def before_validation(self, session: Session) -> None:
        """Remember what the trainer holds of the named metric, to know it from what this validation logs."""
        self._earlier = session.trainer.callback_metrics.get(self.label)

    def after_validation(self, session: Session) -> None:
        """Remember the named metric: a resumed fit begins without it."""
        if isinstance(self.metric, str):
            value = session.trainer.callback_metrics.get(self.metric)
            number = _shared(session, None if value is self._earlier else value)
            self._fresh = number is not None
            if number is not None:
                epoch = session.epoch_after_batch()
                self.logged = {"value": number, "epoch": epoch, "step": session.trainer.global_step}

    def of_validation(self, session: Session) -> float | None:
        """The number of the validation that has just ended; None where it did not log the named metric."""
        if isinstance(self.metric, str):
            return self.logged["value"] if self._fresh else None
        return self.measure(session)

    def of_training(self, session: Session) -> float | None:
        """The named metric as training logged it, where nothing validates."""
        return _shared(session, session.trainer.callback_metrics.get(self.label))

    def at_the_end(self, session: Session) -> float | None:
        """The number of the final weights; None, and a warning, where the named one is of earlier weights."""
        if not isinstance(self.metric, str):
            return self.measure(session)
        trainer = session.trainer
        if not self.logged:
            trained = self.of_training(session)
            if trained is not None:
                return trained
            rank_zero_warn(
                f"metric={self.metric!r} was never logged, so accuracies are unknown; logged were "
                f"{sorted(name for name in trainer.callback_metrics if not name.startswith('compressed_'))}"
            )
            return None
        if self.logged["step"] != trainer.global_step:
            rank_zero_warn(
                f"metric={self.metric!r} was last measured at epoch {self.logged['epoch']:g}, not on the final "
                "weights, so the compressed accuracy is unknown: let the last epoch validate "
                "(check_val_every_n_epoch), or give a torchmetrics metric"
            )
            return None
        return self.logged["value"]

    def restate(self, session: Session, value: float, epoch: float) -> None:
        """The module holds again what a validation measured earlier."""
        if isinstance(self.metric, str):
            self.logged = {"value": value, "epoch": epoch, "step": session.trainer.global_step}

    def load(self, logged: dict[str, Any]) -> None:
        """Take up or begin."""
        self.logged = dict(logged)


def _shared(session: Session, value: Any) -> float | None:
    """Each process logs the metric of its own share, unless with sync_dist=True: all must choose by the same number."""
    return session.processes.number(value if isinstance(value, Tensor | float | int) else None)
