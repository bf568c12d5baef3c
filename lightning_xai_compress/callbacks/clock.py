"""When in a fit: positions counted in training batches, so that a phase may begin inside an epoch."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Trainer

from lightning_xai_compress.checks import check_number

__all__ = ["Clock", "Moment", "check_limits", "check_moment", "check_trained", "clock_of", "epochs_done", "position_of"]

Moment = int | float | str
"""A point in the fit: a whole number of epochs, a share of the fit in [0, 1), or a text such as "1500 steps"."""

_TEXT = re.compile(r"\s*(\d+)\s*(epoch|step)s?\s*")


def check_moment(name: str, moment: Moment) -> Moment:
    """Refuse what can be no moment of any fit; "3 epochs" becomes 3.

    Raises:
        ValueError: A negative epoch, a share outside [0, 1), or a text that is no number of epochs or steps.
    """
    if isinstance(moment, str):
        count, unit = _parse(name, moment)
        return count if unit == "epoch" else moment
    described = f"{name}, a whole number of epochs, a share of the fit or a text such as '1500 steps',"
    number: int | float = check_number(described, moment)
    if isinstance(number, float) and not 0 <= number < 1:
        raise ValueError(f"{name} as a share of the fit must lie in [0, 1), got {number}; epochs are whole numbers")
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")
    return number


def _parse(name: str, text: str) -> tuple[int, str]:
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{name} as a text must be a whole number of steps or epochs, such as '1500 steps' or '3 epochs', got "
            f"{text!r}; a plain number is written without quotes"
        )
    return int(found[1]), found[2]


@dataclass(frozen=True)
class Clock:
    """The length of a fit.

    Args:
        batches: Training batches from the first epoch to the end of the fit.
        epoch_batches: Training batches of one epoch; None where the data does not tell.
        start: Batch at which this compression began: 0, or where a dense checkpoint was taken up.
        accumulation: Pairs (epoch, batches a step from that epoch on), rising, the first of epoch 0.
        steps_a_batch: More than 1 where several optimizers, stepped by hand, count each.
        rehearsal: Whether moments past the end are the last batch, since the fit is only a trial of its code.
    """

    batches: int
    epoch_batches: int | None
    start: int = 0
    accumulation: tuple[tuple[int, int], ...] = ((0, 1),)
    steps_a_batch: int = 1
    rehearsal: bool = False

    def batch_of(self, moment: Moment) -> int:
        """First batch at or after a moment; a share counts from `start`, an epoch or step from the fit's first one.

        Raises:
            ValueError: An epoch other than 0, where the length of an epoch is not known.
        """
        batch = self._batch_of(moment)
        return min(batch, self.batches - 1) if self.rehearsal else batch

    def _batch_of(self, moment: Moment) -> int:
        if isinstance(moment, float):
            # 0.6 * 10 must not become 5 or 7 by rounding of floats
            return self.start + math.floor(moment * (self.batches - self.start) + 1e-9)
        count, unit = _parse("a moment", moment) if isinstance(moment, str) else (moment, "epoch")
        if unit == "step":
            return max(self.batch_of_step(count), self.start)
        if count == 0 or (self.epoch_batches is None and self.rehearsal):
            return self.start
        if self.epoch_batches is None:
            raise ValueError(
                f"phases are given in epochs ({count}), but the training data has no length: use shares of the "
                "fit, such as 0.25, or steps, such as '1500 steps'"
            )
        return max(count * self.epoch_batches, self.start)

    def batch_of_step(self, steps: int) -> int:
        """Batches that so many optimizer steps take; the last batches of an epoch are a step, even if fewer."""
        if self.epoch_batches is None:
            return steps * self.accumulation[0][1] // self.steps_a_batch
        epoch, first, batches = 0, 0, self.accumulation[0][1]  # of the span of epochs that accumulate alike
        for later, other in self.accumulation[1:]:
            past = first + (later - epoch) * -(-self.epoch_batches // batches)
            if past > steps // self.steps_a_batch:
                break
            epoch, first, batches = later, past, other
        epochs, rest = divmod(steps // self.steps_a_batch - first, -(-self.epoch_batches // batches))
        return (epoch + epochs) * self.epoch_batches + min(rest * batches, self.epoch_batches)

    @property
    def steps(self) -> int:
        """Optimizer steps of the fit."""
        most = range(self.batches * self.steps_a_batch + 1)
        return bisect_left(most, self.batches, key=self.batch_of_step)

    def epoch_of(self, batch: int) -> float | None:
        """Epochs done at a batch, with fraction; None where the length of an epoch is not known."""
        return None if self.epoch_batches is None else batch / self.epoch_batches

    def label(self, batch: int) -> str:
        """A batch in words: epochs, or the share of the fit."""
        epoch = self.epoch_of(batch)
        return f"{batch / self.batches:.0%} of the fit" if epoch is None else f"{epoch:g}"[:6]

    def check(self, name: str, moment: Moment, *, last: bool = False) -> int:
        """Like `batch_of`, for a setting of the user.

        Args:
            name: Of the setting.
            moment: Of the user.
            last: Whether the very end of the fit will do.

        Raises:
            ValueError: Past the end of the fit.
        """
        batch = self.batch_of(moment)
        if batch > self.batches or (batch == self.batches and not last):
            epochs = self.epoch_of(self.batches)
            length = f"{self.steps} steps" if epochs is None or isinstance(moment, str) else f"{epochs:g} epochs"
            raise ValueError(f"{name}={moment} lies past the end of the fit, which has {length}")
        return batch


def check_limits(trainer: Trainer) -> None:
    """Refuse, before a fit, settings with which it trains on no batch: Lightning would go through it in silence.

    Raises:
        ValueError: It names the setting.
    """
    limit = getattr(trainer, "limit_train_batches", None)
    for setting, value in (
        ("limit_train_batches", limit),
        ("max_epochs", trainer.max_epochs),
        ("max_steps", trainer.max_steps),
    ):
        if value == 0:
            raise ValueError(
                f"Trainer({setting}=0) trains on no batch, so nothing can be compressed: raise it, or leave the "
                "compression callback out"
            )


def check_trained(trainer: Trainer) -> None:
    """Refuse, after a fit, training data without batches: Lightning has gone through it in silence.

    Raises:
        ValueError: It says where to look.
    """
    if trainer.num_training_batches == 0:
        raise ValueError(
            "the training data gave no batch, so nothing was compressed: expected at least one from "
            "train_dataloader() (is the dataset empty, or smaller than a batch with drop_last=True?)"
        )


def clock_of(trainer: Trainer, start: int | None = None) -> Clock:
    """The length of the fit in batches.

    Steps are turned into batches as Lightning steps: by the accumulation of each epoch (GradientAccumulationScheduler,
    too). In manual optimization every optimizer is taken to step once a batch.

    Raises:
        ValueError: It is not known.
    """
    epoch = None if trainer.num_training_batches == float("inf") else max(int(trainer.num_training_batches), 1)
    manual = not trainer.lightning_module.automatic_optimization
    clock = Clock(
        batches=1,
        epoch_batches=epoch,
        accumulation=((0, 1),) if manual else _accumulation(trainer),
        steps_a_batch=max(len(trainer.optimizers), 1) if manual else 1,
        rehearsal=bool(getattr(trainer, "fast_dev_run", False)),
    )
    limits = [limit for limit in _limits(clock, trainer) if limit is not None]
    if not limits:
        raise ValueError(
            "the length of the fit is not known, so its phases cannot be laid out (a max_time tells none): set "
            "Trainer(max_steps=...), or max_epochs together with limit_train_batches or a dataset that has a length"
        )
    clock = replace(clock, batches=max(min(limits), 1))
    if start is None:
        start = min(position_of(clock, trainer, 0), clock.batches - 1)
    return replace(clock, start=start)


def position_of(clock: Clock, trainer: Trainer, batch_idx: int) -> int:
    """The batch of the clock that is about to train.

    A fit that ends by its steps goes by them, so that it gets to its end even where epochs are shorter than the data
    said, or an optimizer steps more often than once a batch; one that ends by its epochs goes by those.
    """
    epoch = clock.epoch_batches
    by_epochs, by_steps = _limits(clock, trainer)
    passed = [0]
    if by_steps:
        window = 0
        if epoch is not None and trainer.lightning_module.automatic_optimization:
            window = batch_idx % max(int(trainer.num_training_batches), 1) % trainer.accumulate_grad_batches
        passed.append((clock.batch_of_step(trainer.global_step) + window) * clock.batches // by_steps)
    if by_epochs and epoch is not None:
        # an epoch may have become longer or shorter, where its loader is made anew
        done = trainer.current_epoch * epoch + batch_idx * epoch // max(int(trainer.num_training_batches), 1)
        passed.append(done * clock.batches // by_epochs)
    return max(passed)


def _limits(clock: Clock, trainer: Trainer) -> tuple[int | None, int | None]:
    """Batches until max_epochs, and until max_steps, is reached; None where there is no such limit."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    bounded = clock.epoch_batches is not None and epochs is not None and epochs >= 0
    by_epochs = epochs * clock.epoch_batches if bounded else None  # type: ignore[operator]
    return by_epochs, clock.batch_of_step(steps) if steps >= 0 else None


def epochs_done(clock: Clock, trainer: Trainer, batches: int) -> float:
    """Epochs done after so many batches of this one; whole ones where the length of an epoch is not known."""
    if clock.epoch_batches is None:
        return trainer.current_epoch
    return round(trainer.current_epoch + batches / max(int(trainer.num_training_batches), 1), 4)


def _accumulation(trainer: Trainer) -> tuple[tuple[int, int], ...]:
    """Batches a step, from which epoch on."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        # of lightning or of pytorch_lightning
        if any(kind.__name__ == "GradientAccumulationScheduler" for kind in type(callback).__mro__):
            return tuple((epoch, callback.get_accumulate_grad_batches(epoch)) for epoch in callback.epochs)
    return ((0, trainer.accumulate_grad_batches),)
