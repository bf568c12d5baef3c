"""BatchNorm statistics in a fit: those that training gathers, and those estimated anew for compressed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_xai_compress.callbacks.calibration import calibration_batches
from lightning_xai_compress.relevance import tracked_norms, update_batchnorm

__all__ = ["RunningStatistics"]

_SAMPLES = 4096


class RunningStatistics:
    """Shows estimates where the model is looked at, and gives training its own statistics back.

    So a validation more or less changes nothing in what follows it, and a fit that resumes without one (as from a
    checkpoint of the last batch of an epoch) goes on as it would have.

    Args:
        trainer: In fit.
        module: The user's module.
        share: Makes the buffers of all processes alike.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, share: Callable[[], None]) -> None:
        self._trainer = trainer
        self._module = module
        self._share = share
        self._norms = tracked_norms(module)
        self._step = -1
        self._good: list[tuple[Tensor, Tensor]] = []
        self._training: dict[str, Tensor] = {}

    def names(self) -> list[str]:
        """Of the buffers of layers that gather statistics."""
        names = {id(buffer): name for name, buffer in self._module.named_buffers()}
        return [names[id(buffer)] for buffer in self._buffers()]

    def find(self) -> None:
        """Notice which layers train: some may be frozen at the start of an epoch, and validation shows all so."""
        self._norms = tracked_norms(self._module)

    @torch.no_grad()
    def before_batch(self) -> None:
        """Training goes on with its own statistics."""
        self._give_back()
        if not self._good:  # else the last step was dropped, and these are still the last good ones
            self._good = [(buffer, buffer.clone()) for buffer in self._buffers()]

    def keep(self) -> None:
        """The batch was good."""
        self._good = []

    @torch.no_grad()
    def drop(self) -> None:
        """The batch gave values that are not finite: back to what was before it."""
        for buffer, good in self._good:
            buffer.copy_(good)

    def refresh(self, *, again: bool = False, borrowed: bool = False) -> None:
        """Estimate the statistics of the weights that the module holds, once a step.

        Args:
            again: Even if this was done at this step, for other weights.
            borrowed: The module holds the tensors of an average: whose they are takes them back.
        """
        if not self._norms or (self._step == self._trainer.global_step and not again):
            return
        self._step = -1 if borrowed else self._trainer.global_step
        if not self._training and not borrowed:
            buffers = dict(self._module.named_buffers())
            self._training = {name: buffers[name].clone() for name in self.names()}
        validating = self._trainer.validating
        self._trainer.training = True  # the batch hooks ask, and these are training batches
        try:
            with isolate_rng(), self._trainer.precision_plugin.forward_context():
                batches = calibration_batches(self._trainer, samples=_SAMPLES, seed=self._trainer.global_step)
                update_batchnorm(self._module, self._norms, batches)
            self._share()
        finally:
            if validating:
                self._trainer.validating = True

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Inside, statistics are estimates for the present weights; afterwards training's own, if they were before."""
        shown = bool(self._training)
        self.refresh(again=True)
        try:
            yield
        finally:
            if not shown:
                self._give_back()

    @torch.no_grad()
    def _give_back(self) -> None:
        if self._training:
            buffers = dict(self._module.named_buffers())
            for name, own in self._training.items():
                buffers[name].copy_(own)
            self._training = {}
            self._step = -1

    def state_dict(self) -> dict[str, Tensor]:
        """Training's own statistics, while the module holds others."""
        return dict(self._training)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up or begin."""
        self._training = {name: tensor.clone() for name, tensor in state.items()}

    def _buffers(self) -> list[Tensor]:
        return [buffer for norm in self._norms for buffer in norm.buffers()]
