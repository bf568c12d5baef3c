"""When in a fit: positions counted in training batches, so that a phase may begin inside an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer

from lightning_xai_compress.checks import check_number

__all__ = ["Clock", "Moment", "check_moment", "clock_of"]

Moment = int | float
"""A point in the fit: whole numbers are epochs, fractions in [0, 1) a share of the fit."""


def check_moment(name: str, moment: Moment) -> Moment:
    """Refuse what can be no moment of any fit.

    Raises:
        ValueError: A negative epoch, or a share outside [0, 1).
    """
    moment = check_number(f"{name}, a whole number of epochs or a share of the fit,", moment)
    if isinstance(moment, float) and not 0 <= moment < 1:
        raise ValueError(f"{name} as a share of the fit must lie in [0, 1), got {moment}; epochs are whole numbers")
    if moment < 0:
        raise ValueError(f"{name} must not be negative, got {moment}")
    return moment


@dataclass(frozen=True)
class Clock:
    """The length of a fit.

    Args:
        batches: Training batches from the first epoch to the end of the fit.
        epoch_batches: Training batches of one epoch; None where the data does not tell.
        start: Batch at which this compression began: 0, or where a dense checkpoint was taken up.
    """

    batches: int
    epoch_batches: int | None
    start: int = 0

    def batch_of(self, moment: Moment) -> int:
        """First batch at or after a moment; a share counts from `start`, an epoch from the fit's first one.

        Raises:
            ValueError: An epoch other than 0, where the length of an epoch is not known.
        """
        if moment == 0:
            return self.start
        if isinstance(moment, int):
            if self.epoch_batches is None:
                raise ValueError(
                    f"phases are given in epochs ({moment}), but the training data has no length: use shares of the "
                    "fit, such as 0.25"
                )
            return max(moment * self.epoch_batches, self.start)
        # 0.6 * 10 must not become 5 or 7 by rounding of floats
        return self.start + math.floor(moment * (self.batches - self.start) + 1e-9)

    def epoch_of(self, batch: int) -> float | None:
        """Epochs done at a batch, with fraction; None where the length of an epoch is not known."""
        return None if self.epoch_batches is None else batch / self.epoch_batches

    def label(self, batch: int) -> str:
        """A batch in words: epochs, or the share of the fit."""
        epoch = self.epoch_of(batch)
        return f"{batch / self.batches:.0%} of the fit" if epoch is None else f"{epoch:g}"[:6]

    def check(self, name: str, moment: Moment) -> int:
        """Like `batch_of`, for a setting of the user.

        Raises:
            ValueError: Past the end of the fit.
        """
        batch = self.batch_of(moment)
        if batch >= self.batches:
            raise ValueError(
                f"{name}={moment} lies past the end of the fit, which has {self.label(self.batches)} epochs"
            )
        return batch


def clock_of(trainer: Trainer, start: int | None = None) -> Clock:
    """The length of the fit in batches.

    Raises:
        ValueError: It is not known.
    """
    epoch = None if trainer.num_training_batches == float("inf") else max(int(trainer.num_training_batches), 1)
    limits = []
    if epoch is not None and trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * epoch)
    if trainer.max_steps >= 0:
        limits.append(_batches_of(trainer, trainer.max_steps, epoch))
    if not limits:
        raise ValueError(
            "the length of the fit is not known, so its phases cannot be laid out: set Trainer(max_steps=...), or "
            "max_epochs together with limit_train_batches or a dataset that has a length"
        )
    batches = max(min(limits), 1)
    if start is None:
        begun = trainer.fit_loop.epoch_loop.total_batch_idx + 1 if epoch is None else trainer.current_epoch * epoch
        start = min(begun, batches - 1)
    return Clock(batches, epoch, start)


def _batches_of(trainer: Trainer, steps: int, epoch: int | None) -> int:
    """Batches that so many optimizer steps take; the last batches of an epoch are a step, even if fewer."""
    if not trainer.lightning_module.automatic_optimization:
        return max(steps // max(len(trainer.optimizers), 1), 1)  # every optimizer counts its steps
    accumulate = trainer.accumulate_grad_batches
    if epoch is None:
        return steps * accumulate
    epochs, rest = divmod(steps, -(-epoch // accumulate))
    return epochs * epoch + min(rest * accumulate, epoch)
