"""What the callbacks share: the first of them in a Trainer's list drives the session, the others hang on to it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Stage

__all__ = ["CompressionCallback"]

_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


class CompressionCallback(Callback):
    """Base of all callbacks of this package: forwards Lightning's hooks to the session of the fit.

    Lightning's side of the story is here alone: weights change only in `on_train_batch_start`, so that a metric
    always belongs to the weights beside it.
    """

    def __init__(self) -> None:
        self.session: Session | None = None
        self._restored: dict[str, Any] = {}

    def stages(self) -> list[Stage]:
        """The stages that this callback brings, in no particular order."""
        raise NotImplementedError

    # --- the session's life

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything runs, what can be seen to be wrong without data."""
        if stage != "fit":
            return
        self.session, self._restored = None, {}
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
        strategy = {kind.__name__ for kind in type(trainer.strategy).__mro__}  # of lightning or of pytorch_lightning
        if not strategy & {"SingleDeviceStrategy", "DDPStrategy"} or strategy & _SHARDED:
            raise ValueError(
                f"{type(trainer.strategy).__name__} is not supported: weights must be whole on every device. Use "
                "Trainer(strategy='auto') or strategy='ddp'"
            )
        for other in _callbacks(trainer):
            if any(kind.__name__ == "WeightAveraging" for kind in type(other).__mro__):
                raise ValueError(
                    f"{type(other).__name__} averages weights after they were pruned and quantized, which fills the "
                    "zeros and leaves the grid: remove one of the two callbacks"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the session: only now are all layers, the training data and the optimizers there."""
        if self._leads(trainer):
            ours = [each for each in _callbacks(trainer) if isinstance(each, CompressionCallback)]
            # another order of the callbacks makes another one lead
            restored = next((each._restored for each in ours if each._restored), {})
            self.session = Session(trainer, pl_module, _all_stages(trainer), restored)
            for each in ours:
                each._restored = {}
            self.session.begin()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a usable model behind: Lightning calls no teardown after an error."""
        if self.session is not None:
            self.session.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers; state and report stay readable."""
        if self.session is not None:
            self.session.close()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types, keyed by parameter name; empty for all but the leading callback."""
        return self.session.state_dict() if self.session is not None else self._restored

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the session begins."""
        self._restored = state_dict

    # --- during the fit

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notice which BatchNorm layers train."""
        if self.session is not None:
            self.session.on_epoch_start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do what is due at this batch."""
        if self.session is not None:
            self.session.advance(batch_idx)

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
                self.session.refresh_batchnorm()  # type: ignore[union-attr]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was measured, before a checkpoint is saved."""
        if self._in_fit(trainer):
            for stage in self.session.stages:  # type: ignore[union-attr]
                stage.after_validation(self.session)  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export and report."""
        if self.session is not None:
            self.session.finish()

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
