"""The metric of the compressed model under a name of its own, for callbacks that choose by a metric."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_xai_compress.callbacks.best import Mode

__all__ = ["CompressedMetric", "check_monitors", "mode_of", "placeholder"]

_CHOOSING = ("ModelCheckpoint", "EarlyStopping")
_LOW = ("loss", "error", "err", "mae", "mse", "rmse", "perplexity", "wer", "cer")


class CompressedMetric:
    """What callbacks that choose by a metric find as `compressed_<name>`, from the first epoch on.

    Args:
        name: Of the metric; "" for none: then nothing is published.
        mode: Whether the largest or the smallest is best; None: see `mode_of`.
    """

    def __init__(self, name: str, mode: Mode | None) -> None:
        self.key = f"compressed_{name}" if name else ""
        self._name = name
        self._mode = mode

    def publish(self, trainer: Trainer, value: float | None, *, progress: float) -> None:
        """To callbacks, and to loggers only what was measured.

        Args:
            trainer: In fit.
            value: Of the compressed model; None as long as there is none.
            progress: Share of the fit that is done, in [0, 1].
        """
        if not self.key:
            return
        if value is None:
            shown = placeholder(self._mode or mode_of(trainer, (self.key, self._name)), progress)
        else:
            shown = torch.tensor(value)
            for logger in trainer.loggers:
                logger.log_metrics({self.key: value}, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics[self.key] = shown


def check_monitors(trainer: Trainer, key: str) -> None:
    """Warn of a ModelCheckpoint or EarlyStopping that would choose, or stop, before compression is done.

    Args:
        trainer: Its callbacks are looked at.
        key: What the metric of the compressed model is called; "" where no metric was named.

    Raises:
        ValueError: One monitors the compressed metric of something that is not measured, or reads it too early.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for kind, each in ((_kind(each), each) for each in callbacks):
        monitored = getattr(each, "monitor", None)
        if kind and monitored == key and getattr(each, "divergence_threshold", None) is not None:
            raise ValueError(
                f"{kind}(monitor={key!r}, divergence_threshold=...) would end the fit at once: until compression is "
                "done the metric is worse than any threshold. Leave it out, or let another EarlyStopping "
                f"watch {key.removeprefix('compressed_')!r} for it"
            )
        if not kind or not isinstance(monitored, str) or monitored == key:
            continue
        if monitored.startswith("compressed_"):
            name = monitored.removeprefix("compressed_")
            present = f"what is measured is {key!r}" if key else "no metric is named"
            raise ValueError(
                f"{kind} monitors {monitored!r}, but {present}: write XAICompression(metric={name!r}, ...)"
            )
        asked = "" if key else f" and XAICompression(metric={monitored!r}, ...)"
        better = f"{kind}(monitor={key or 'compressed_' + monitored!r}, ...){asked}"
        harm = (
            "will keep a model from before compression as the best one"
            if kind == "ModelCheckpoint"
            else "may end the fit before compression is done"
        )
        rank_zero_warn(f"{kind}(monitor={monitored!r}) {harm}: change it to {better}")


def mode_of(trainer: Trainer, names: tuple[str, ...]) -> Mode:
    """Whether large or small is good: as a callback that monitors one of the names says, or by the name itself."""
    for each in trainer.callbacks:  # type: ignore[attr-defined]
        mode = getattr(each, "mode", None)
        if _kind(each) and getattr(each, "monitor", None) in names and mode in ("min", "max"):
            found: Mode = mode
            return found
    words = names[0].lower().replace("/", "_").replace("-", "_").split("_")
    return "min" if any(word in _LOW for word in words) else "max"


def placeholder(mode: Mode, progress: float) -> Tensor:
    """Worse than any measured value, yet better from one validation to the next, so that no patience is used up.

    Finite, since EarlyStopping ends a fit at infinity.

    Args:
        mode: Whether the largest or the smallest is best.
        progress: Share of the fit that is done, in [0, 1].
    """
    value = torch.tensor(1e38 * (2 - progress))
    return value if mode == "min" else -value


def _kind(callback: Any) -> str:
    """By name, since there are two namespaces of Lightning."""
    return next((each.__name__ for each in type(callback).__mro__ if each.__name__ in _CHOOSING), "")
