"""Figures of the compression for the Trainer's loggers, at the batches at which they change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_xai_compress.callbacks.latent import LatentCopy
from lightning_xai_compress.plan import CompressionPlan, ScoreMap
from lightning_xai_compress.report import dense_bytes, estimated_bytes
from lightning_xai_compress.structure import Kept, shrunk_plan

__all__ = ["Logs", "figures"]

_PREFIX = "compression"
_MOST_VALUES = 65_536


class Logged(Protocol):
    """What is read of a session."""

    trainer: Trainer
    module: LightningModule
    latent: LatentCopy
    scores: ScoreMap | None

    def smaller(self) -> AbstractContextManager[Kept]:
        """Within it the module is as small as files hold it."""
        ...

    @property
    def relevance_shares(self) -> dict[str, float]:
        """Share of each layer in all absolute relevance at the latest scoring."""
        ...


class Logs:
    """Gathers what changed at a batch, and hands it to all loggers once, when all stages are through.

    Once, because a pruning step and an allocation may fall on the same batch, and a logger keeps one value a step. The
    step is the number of batches that stepped so far: what `self.log` writes for the same batch, whatever the number of
    optimizers, and part of checkpoints, so that it goes on after a resume. Batches that are accumulated share a step:
    what changed at any of them is logged with the last one. Nothing is logged without a logger, in `fast_dev_run`, and
    on other ranks than global zero.
    """

    def __init__(self) -> None:
        self._decided = False
        self._shares: dict[str, float] = {}
        self._relevance: dict[str, Tensor] = {}
        self._dense: int | None = None
        self._written: dict[str, float] = {}
        self._failed: set[int] = set()

    def decided(self) -> None:
        """Masks or bit widths may have changed."""
        self._decided = True

    def scored(self, session: Logged) -> None:
        """There are new scores: keep what is logged of them, since they may be gone when that is due."""
        if session.scores is None or not _is_logged(session.trainer):
            return
        self._shares = session.relevance_shares
        self._relevance = {name: _sample(tensor) for name, tensor in session.scores.relevance.items()}

    def write(self, session: Logged) -> None:
        """Log what has changed since the last call, if anything has."""
        trainer = session.trainer
        if not (self._decided or self._shares) or trainer.fit_loop._should_accumulate():
            return
        shares, relevance = self._shares, self._relevance
        self._decided, self._shares, self._relevance = False, {}, {}
        if not _is_logged(trainer):
            return
        plan = session.latent.plan()
        if self._dense is None:
            self._dense = dense_bytes(session.module)
        with session.smaller() as kept:
            left = shrunk_plan(plan, kept).allocation
        scalars = figures(plan, self._dense, None if left is None else left.average_bits)
        histograms: dict[str, Tensor] = {}
        if scalars == self._written:
            scalars = {}
        else:
            self._written = dict(scalars)
            widths = plan.allocation.bits if plan.allocation is not None else {}
            histograms |= {f"{_PREFIX}/bits/{name}": bits for name, bits in widths.items()}
        scalars |= {f"{_PREFIX}/relevance_share/{name}": share for name, share in shares.items()}
        histograms |= {f"{_PREFIX}/relevance/{name}": tensor for name, tensor in relevance.items()}
        if not scalars:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics({**scalars, "epoch": trainer.current_epoch}, step=step)
            self._draw(logger, histograms, step)
            logger.save()

    def _draw(self, logger: Any, histograms: Mapping[str, Tensor], step: int) -> None:
        """Histograms, where the logger has TensorBoard's call for them; a logger that cannot costs no training."""
        if id(logger) in self._failed:
            return
        try:
            add = getattr(logger.experiment, "add_histogram", None)
            for name, tensor in histograms.items():
                values = _sample(tensor)
                if add is not None and values.numel():
                    add(name, values.numpy(), step)
        except Exception as error:  # whatever another library raises
            self._failed.add(id(logger))
            rank_zero_warn(f"{type(logger).__name__} gets no histograms: {type(error).__name__}: {error}")


def figures(plan: CompressionPlan, dense: int, bits: float | None) -> dict[str, float]:
    """The scalars of what was decided so far, by their names in the log.

    Args:
        plan: Masks and bit widths.
        dense: Bytes of the dense model.
        bits: Mean of the weights that files hold; None before they are quantized.

    Returns:
        Sparsity in [0, 1] and, once quantized, mean bits: of all compressible weights, and by parameter name; and the
        bytes of the packed file as `report.estimated_bytes` guesses them, what the table before training shows, too.
    """
    layers = {name: 1 - _mean(keep) for name, keep in plan.mask.keep.items()}
    result = {f"{_PREFIX}/sparsity": plan.mask.sparsity, **_by_layer("sparsity", layers.items())}
    if plan.allocation is not None and bits is not None:
        means = ((name, _mean(widths)) for name, widths in plan.allocation.bits.items())
        result |= {f"{_PREFIX}/average_bits": bits, **_by_layer("average_bits", means)}
    weights = sum(keep.numel() for keep in plan.mask.keep.values())
    result[f"{_PREFIX}/estimated_bytes"] = float(estimated_bytes(dense, weights, plan.mask.sparsity, bits))
    return result


def _is_logged(trainer: Trainer) -> bool:
    return trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False) and bool(trainer.loggers)


def _by_layer(figure: str, values: Iterable[tuple[str, float]]) -> dict[str, float]:
    return {f"{_PREFIX}/{figure}/{name}": value for name, value in values}


def _mean(tensor: Tensor) -> float:
    return float(tensor.double().mean()) if tensor.numel() else 0.0


def _sample(tensor: Tensor) -> Tensor:
    """The finite ones of so many values at most, drawn at random: binning all of a large layer takes seconds."""
    values = tensor.detach().flatten()
    if values.numel() > _MOST_VALUES:
        drawn = torch.randint(values.numel(), (_MOST_VALUES,), generator=torch.Generator().manual_seed(0))
        values = values[drawn.to(values.device)]
    values = values.cpu().float()
    return values[torch.isfinite(values)]
