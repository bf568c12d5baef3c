"""What the callbacks share: the first of them in a Trainer's list drives the session, the others hang on to it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_xai_compress.callbacks.averaging import ordered
from lightning_xai_compress.callbacks.clock import check_limits, check_trained
from lightning_xai_compress.callbacks.processes import check_strategy, check_whole
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Stage

__all__ = ["CompressionCallback"]


class CompressionCallback(Callback):
    """Base of all callbacks of this package: forwards Lightning's hooks to the session of the fit.

    Lightning's side of the story is here alone: weights change only in `on_train_batch_start`, so that a metric
    always belongs to the weights beside it.
    """

    def __init__(self) -> None:
        self.session: Session | None = None
        self._restored: dict[str, Any] = {}
        self._previous: Session | None = None

    def stages(self) -> list[Stage]:
        """The stages that this callback brings, in no particular order."""
        raise NotImplementedError

    # --- the session's life

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything runs, what can be seen to be wrong without data."""
        if stage != "fit":
            return
        last = self.session or self._previous  # the latter where a fit failed before it began
        if last is not None:
            last.averaging.close()
        self._previous = last if last is not None and last.belongs_to(trainer, pl_module) else None
        self.session, self._restored = None, {}
        check_strategy(trainer.strategy)
        check_limits(trainer)
        for own in self.stages():
            own.check_settings(trainer)
        if not self._leads(trainer):
            return
        stages = _all_stages(trainer)
        kinds = [type(each) for each in stages]
        double = sorted({kind.__name__ for kind in kinds if kinds.count(kind) > 1})
        if double:
            raise ValueError(
                f"the Trainer has {' and '.join(double)} twice: XAICompression already brings all four stages, so give "
                "it alone, or the stages one by one"
            )
        trainer.callbacks = ordered(_callbacks(trainer), CompressionCallback)  # type: ignore[attr-defined]

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell which metrics there are: afterwards the trainer has forgotten them."""
        for stage in self.stages():
            stage.tried(frozenset(trainer.callback_metrics))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the session: only now are all layers, the training data and the optimizers there."""
        if self._leads(trainer):
            check_whole(pl_module)
            # a finder of learning rates or batch sizes takes all callbacks out while it tries
            self._make_session(trainer, pl_module).begin(active=lambda: self in _callbacks(trainer))

    def _make_session(self, trainer: Trainer, pl_module: LightningModule) -> Session:
        ours = [each for each in _callbacks(trainer) if isinstance(each, CompressionCallback)]
        # another order of the callbacks makes another one lead
        restored = next((each._restored for each in ours if each._restored), {})
        if not restored and self._previous is not None and self._previous.latent.holds():
            restored = self._previous.state_dict()  # trainer.fit once more, with a larger max_epochs
        self.session = Session(trainer, pl_module, _all_stages(trainer), restored)
        self._previous = None
        for each in ours:
            each._restored = {}
        return self.session

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a usable model behind: Lightning calls no teardown after an error.

        Where the fit ran in other processes (`ddp_spawn`), the process that asked for it sees no other hook.
        """
        if trainer.state.fn == "fit":
            for stage in self.stages():
                stage.failed()
        if self.session is not None:
            self.session.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers; state and report stay readable."""
        if self.session is not None:
            self.session.close()

    def __getstate__(self) -> dict[str, Any]:
        """For `ddp_spawn`: without the session, which holds the Trainer, optimizers and hooks of a fit."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**kept, "session": None, "_previous": None}  # Lightning's `log` is a method of the module

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types, keyed by parameter name; empty for all but the leading callback."""
        if self.session is None or (self._restored and not self.session.open):
            return self._restored  # of the checkpoint that trainer.test, say, has loaded since
        return self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the session begins; after a trial within a fit, its session goes on as it was."""
        if self.session is None or not self.session.open:
            self._restored = state_dict

    # --- during the fit

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do what is due at this batch."""
        if self.session is not None:
            # what the hook is told lags behind where training_step takes a dataloader_iter
            self.session.advance(trainer.fit_loop.epoch_loop.batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The loss goes back, and nothing else does."""
        if self.session is not None:
            self.session.in_backward = True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In manual optimization gradients are clipped before Lightning knows of a step."""
        if self.session is not None:
            self.session.in_backward = False
        if self.session is not None and not pl_module.automatic_optimization:
            self.session.latent.mask_gradients()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask gradients and open the latents; runs before Lightning clips gradients."""
        if self.session is not None:
            self.session.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the latents where a gradient scaler skipped the step, and look at the loss."""
        if self.session is not None:
            self.session.after_batch(outputs)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make BatchNorm statistics those of the compressed weights."""
        if self._in_fit(trainer):
            with torch.inference_mode(False):
                self.session.before_validation()  # type: ignore[union-attr]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compress an average of weights that a callback in front of ours has just swapped in."""
        if self._in_fit(trainer):
            with torch.inference_mode(False):
                self.session.show_average()  # type: ignore[union-attr]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was measured, before a checkpoint is saved."""
        if self._in_fit(trainer):
            with torch.inference_mode(False):
                self.session.after_validation()  # type: ignore[union-attr]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the metric of a fit that does not validate, before a checkpoint is saved."""
        if self.session is not None:
            self.session.after_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export and report."""
        if self.session is not None:
            self.session.finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the last word on the weights; export, where a fit was resumed that had only that left to do."""
        if self.session is not None:
            self.session.seal()
        elif any(isinstance(each, CompressionCallback) and each._restored for each in _callbacks(trainer)):
            if self._leads(trainer):
                pl_module.to(trainer.strategy.root_device)  # Lightning has just put it on the CPU
                self._make_session(trainer, pl_module).export()
                pl_module.cpu()
        else:
            check_trained(trainer)

    def _in_fit(self, trainer: Trainer) -> bool:
        """Whether a validation belongs to the fit of our session, and is no sanity check."""
        return self.session is not None and self.session.open and not trainer.sanity_checking

    def _leads(self, trainer: Trainer) -> bool:
        return next(each for each in _callbacks(trainer) if isinstance(each, CompressionCallback)) is self


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _all_stages(trainer: Trainer) -> list[Stage]:
    return [
        stage
        for callback in _callbacks(trainer)
        if isinstance(callback, CompressionCallback)
        for stage in callback.stages()
    ]
