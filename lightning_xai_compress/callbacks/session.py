"""The state of one fit that the stages share: clock, latents, latest scores, and what has been done so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer

from lightning_xai_compress.callbacks.averaging import Averaging
from lightning_xai_compress.callbacks.batchnorm import RunningStatistics
from lightning_xai_compress.callbacks.calibration import set_epoch
from lightning_xai_compress.callbacks.clock import clock_of, epochs_done, position_of
from lightning_xai_compress.callbacks.latent import LatentCopy
from lightning_xai_compress.callbacks.logs import Logs
from lightning_xai_compress.callbacks.monitor import check_monitors
from lightning_xai_compress.callbacks.outline import schedule_table
from lightning_xai_compress.callbacks.processes import Processes
from lightning_xai_compress.callbacks.scorer import Scorer
from lightning_xai_compress.callbacks.stage import Stage
from lightning_xai_compress.criteria import criterion_name
from lightning_xai_compress.errors import NonFiniteError, RelevanceError
from lightning_xai_compress.layers import find_layers
from lightning_xai_compress.plan import ScoreMap, Skipped
from lightning_xai_compress.relevance import evaluation, forward
from lightning_xai_compress.structure import Kept

__all__ = ["Session"]


class Session:
    """One fit.

    Args:
        trainer: In fit, with data and optimizers set up.
        module: The user's module.
        stages: All stages in the Trainer.
        restored: State of an earlier session to continue, or empty.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, stages: Sequence[Stage], restored: dict[str, Any]
    ) -> None:
        self.trainer = trainer
        self.processes = Processes(trainer)
        self.module = module
        self.stages = sorted(stages, key=lambda stage: stage.rank)
        # a layer that one stage excludes is left alone by all: no layer is half compressed
        layers = find_layers(module, exclude=sorted({pattern for stage in stages for pattern in stage.exclude}))
        parameters = dict(module.named_parameters())
        self.latent = LatentCopy({name: parameters[name] for name in layers.names})
        self.skipped = list(layers.skipped)
        self.scorer = Scorer(trainer, module, self.processes, self.stages, layers.names)
        self.keeps_scores = False  # in checkpoints, for a later use
        self.holds_scores = False  # else they go once they are used: three or more copies of the weights
        self.fresh_batchnorm = False  # for scores: those of training lag behind weights that were just pruned
        self.scores: ScoreMap | None = None
        self.history: list[dict[str, Any]] = []
        self.logs = Logs()
        self.halted = ""
        self.started = False
        self._warned = False
        self.epoch_begins = False
        self.in_step = self.in_backward = False  # of training; the second, the backward pass of its loss
        self._shares: dict[str, float] = {}
        self.clock = clock_of(trainer)
        self.open = True
        self.batchnorm = RunningStatistics(trainer, module, lambda: self.processes.share_buffers(module))
        self.averaging = Averaging(trainer, module, self.latent, self.batchnorm.names())
        self._load(restored)

    def begin(self, *, active: Callable[[], bool] = lambda: True) -> None:
        """Check everything once, then watch the optimizers.

        Args:
            active: Whether a step is one of this fit, and none of a trial within it.

        Raises:
            ValueError, CompressionError: What is wrong, before the first batch.
        """
        check_monitors(self.trainer, next((stage.metric_key for stage in self.stages if stage.metric_key), ""))
        for stage in self.stages:
            stage.begin(self)
        if any(stage.needs_scores for stage in self.stages):
            scores = self.scorer.probe()
            self._name_unknown(scores)
            for stage in self.stages:
                stage.check_scores(scores)
        self.latent.attach(self.trainer.optimizers, active=active)
        if self.trainer.is_global_zero:
            print(f"\n{schedule_table(self.module, self.clock, self.stages, self.latent.parameters)}\n")

    def advance(self, batch_idx: int) -> None:
        """Let every stage do what is due at this batch of the epoch."""
        self.in_step, self.epoch_begins = False, batch_idx == 0
        if self.epoch_begins:
            self.batchnorm.find()
        self.batchnorm.before_batch()
        if self.epoch_begins:
            self.latent.adopt()
        for stage in self.stages:
            stage.advance(self, self.position(batch_idx))
        self.logs.write(self)
        if not self.holds_scores:
            self.scores = None
        self.in_step = True

    def finish(self) -> None:
        """BatchNorm, then the stages' last words."""
        set_epoch(self.trainer, max(self.trainer.current_epoch - 1, 0))  # as it is, unless no batch was left to train
        foreign = self.latent.adopt()
        if self.latent.changed:
            self.batchnorm.refresh(again=foreign or self.averaging.present)
        for stage in self.stages:
            stage.finish(self)

    def export(self) -> None:
        """Only finish: the checkpoint was the last of its fit."""
        self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
        for stage in self.stages:
            stage.begin(self)
        self.averaging.transfer()
        self.finish()

    def belongs_to(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether it was a fit of these."""
        return self.trainer is trainer and self.module is module

    def seal(self) -> None:
        """Nothing may change the exported weights any more."""
        foreign = self.latent.restore()
        self.averaging.seal()
        if foreign:
            rank_zero_warn(
                "Another callback changed weights after the export (in on_train_end, say): pruned weights are zero "
                "and quantized ones on their grid again, as in the files. List that callback before this one"
            )

    def close(self) -> None:
        """Leave the model compressed and usable; may be called twice."""
        if self.open:
            self.open = False
            self.latent.detach()
            for stage in self.stages:
                stage.close()

    # --- what the stages use

    def stage(self, kind: type[Any]) -> Any:
        """The stage of a class, or None."""
        return next((stage for stage in self.stages if isinstance(stage, kind)), None)

    @property
    def budget(self) -> Any:
        """The stage that decides about sparsity and bits, `Budget`; None where the user does."""
        return next((stage for stage in self.stages if stage.is_budget), None)

    def smaller(self) -> AbstractContextManager[Kept]:
        """Within it the module is as small as files hold it; gives what is kept of each tensor that is smaller."""
        found = (stage.smaller(self.module) for stage in self.stages)
        return next((each for each in found if each is not None), nullcontext({}))

    @property
    def led(self) -> bool:
        """Whether that stage decides alone, and pruning and precision only lend it their settings."""
        return self.budget is not None and bool(self.budget.leads)

    def position(self, batch_idx: int) -> int:
        """Batches since the start of the fit, as its clock counts them."""
        return position_of(self.clock, self.trainer, batch_idx)

    @property
    def batch(self) -> int:
        """Batches since the start of the fit, as its clock counts them."""
        return self.position(self.trainer.fit_loop.epoch_loop.batch_idx)

    @property
    def epoch_ends(self) -> bool:
        """Whether the batch that trains now is the last one before the epoch's validation, or of the fit."""
        loop = self.trainer.fit_loop.epoch_loop
        return loop.batch_progress.is_last_batch or self.trainer.global_step == self.trainer.max_steps

    def epoch(self) -> float:
        """Epochs done when the batch that trains now began."""
        return epochs_done(self.clock, self.trainer, self.trainer.fit_loop.epoch_loop.batch_idx)

    def epoch_after_batch(self) -> float:
        """Epochs done when the batch that trains now is over."""
        return epochs_done(self.clock, self.trainer, self.trainer.fit_loop.epoch_loop.batch_idx + 1)

    def progress(self) -> float:
        """Share of the fit done when the batch that trains now is over, in [0, 1]."""
        return min(self.position(self.trainer.fit_loop.epoch_loop.batch_idx + 1) / self.clock.batches, 1.0)

    def start(self, batch: int) -> None:
        """Tell all stages, once, that the weights are about to change."""
        if not self.started:
            self.started = True
            for stage in self.stages:
                stage.before_compression(self, batch)

    def rescore(self, batch: int) -> ScoreMap | None:
        """Score all layers on training samples; None, and a halt, where relevance is not finite or nowhere."""
        try:
            with self.batchnorm.fresh() if self.fresh_batchnorm else nullcontext():
                scores = self.scorer.training_samples(batch)
        except NonFiniteError as error:
            self.halt(f"relevance is not finite: {error}")
            return None
        except RelevanceError as error:
            self.halt(f"weights could not be scored: {error}")
            return None
        sums = {
            name: float(scores.relevance[name].abs().nansum()) for name in scores.score if name not in scores.unknown
        }
        if sum(sums.values()) == 0:
            self.halt("relevance is zero everywhere: what is explained does not depend on the weights")
            return None
        self.scores = scores
        self._shares = {name: value / sum(sums.values()) for name, value in sums.items()}
        self.logs.scored(self)
        return scores

    @torch.no_grad()
    def run(self, batches: Iterable[Any]) -> None:
        """Forward passes in evaluation mode, for what layers see of them."""
        with isolate_rng(), self.trainer.precision_plugin.forward_context(), evaluation(self.module):
            for index, batch in enumerate(batches):
                forward(self.module, batch, index)

    @property
    def provenance(self) -> dict[str, str]:
        """How the model was made, for the files."""
        found = {"model": type(self.module).__qualname__, "criterion": criterion_name(self.scorer.criterion)}
        for stage in self.stages:
            found |= stage.provenance
        return found

    @property
    def relevance_shares(self) -> dict[str, float]:
        """Share of each layer in all absolute relevance at the latest scoring."""
        return dict(self._shares)

    def halt(self, reason: str) -> None:
        """Stop pruning for good, keep the weights as they are, and say so."""
        if not self.halted:
            self.halted = reason
            rank_zero_warn(f"pruning stops here and the last good weights are kept: {reason}")

    def stopped(self) -> bool:
        """Whether pruning was halted on any rank; every rank must ask at the same batch."""
        if self.trainer.strategy.reduce_boolean_decision(bool(self.halted), all=False):
            self.halt("another process met values that are not finite")
        return bool(self.halted)

    def record(self, event: str, batch: int, message: str, **facts: float | int | str) -> None:
        """Remember a step for the report, and say it once."""
        self.history.append({"event": event, "epoch": self.epoch(), **facts})
        self.logs.decided()
        rank_zero_info(f"[compression] epoch {self.epoch():.2f}: {message}")

    # --- during training

    def before_step(self, optimizer: Optimizer) -> None:
        """Keep a step with non-finite gradients away from the weights; a gradient scaler does that itself."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if not scaled and not _finite_gradients(optimizer):
            optimizer.zero_grad(set_to_none=True)
            self.batchnorm.drop()
            self._not_finite(
                f"loss or gradients are not finite at step {self.trainer.global_step}; such steps are left out"
            )
        else:
            self.batchnorm.keep()
        self.latent.before_step(optimizer)

    def after_batch(self, outputs: Any) -> None:
        """Close what a skipped step left open; a gradient scaler hides a loss that is not finite, so look at it."""
        self.latent.settle()
        self.in_step = False
        for stage in self.stages:
            stage.after_batch(self)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and not torch.isfinite(loss).all():
            self._not_finite(f"loss is not finite before step {self.trainer.global_step}")

    def _not_finite(self, reason: str) -> None:
        if self.started:
            self.halt(reason)
        elif not self._warned:  # a stumble in the warm-up need not cost the compression
            self._warned = True
            rank_zero_warn(f"before compression began: {reason}")

    def before_validation(self) -> None:
        """Make BatchNorm statistics those of the compressed weights."""
        for stage in self.stages:
            stage.before_validation(self)
        if not self.averaging.present and self.latent.changed:
            self.batchnorm.refresh()

    def show_average(self) -> None:
        """An average is in the module now: what validates is the average masked and on the grid."""
        if self.averaging.present:
            self.averaging.show(lambda: self.batchnorm.refresh(again=True, borrowed=True))

    def after_validation(self) -> None:
        """Let the stages see the weights that were validated."""
        with self.averaging.shown():
            for stage in self.stages:
                stage.after_validation(self)

    def after_epoch(self) -> None:
        """Let the stages see what was measured where nothing validates."""
        for stage in self.stages:
            stage.after_epoch(self)

    @property
    def complete(self) -> bool:
        """Whether all that was planned has been done to the weights."""
        return all(stage.complete for stage in self.stages)

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types."""
        state: dict[str, Any] = {
            "start": self.clock.start,
            "latent": self.latent.state_dict(),
            "averaged": self.averaging.state_dict(),
            "batchnorm": self.batchnorm.state_dict(),
            "stages": {type(stage).__name__: stage.state() for stage in self.stages},
            "history": [dict(event) for event in self.history],
            "skipped": [asdict(entry) for entry in self.skipped],
            "halted": self.halted,
            "started": self.started,
            "relevance_shares": dict(self._shares),
            "provenance": self.provenance,
        }
        if self.keeps_scores and self.scores is not None:
            state["scores"] = {
                "score": dict(self.scores.score),
                "relevance": dict(self.scores.relevance),
                "sensitivity": dict(self.scores.sensitivity),
                "absolute": dict(self.scores.absolute),
                "standard_error": dict(self.scores.standard_error),
                "batches": self.scores.batches,
                "samples": self.scores.samples,
                "signed": self.scores.signed,
            }
        return state

    def _load(self, state: dict[str, Any]) -> None:
        for stage in self.stages:
            stage.load(state.get("stages", {}).get(type(stage).__name__, {}))
        if not state:
            return
        self.clock = clock_of(self.trainer, start=state["start"])
        self.latent.load_state_dict(state["latent"])
        self.averaging.load_state_dict(state.get("averaged", {}))
        self.batchnorm.load_state_dict(state.get("batchnorm", {}))
        self.latent.adopt()  # a checkpoint of averages, resumed without them
        self.history = list(state["history"])
        self.skipped = [Skipped(**entry) for entry in state["skipped"]]
        self.halted = state["halted"]
        self.started = state["started"]
        self._shares = dict(state["relevance_shares"])
        if "scores" in state:
            self.scores = ScoreMap(**state["scores"])

    def _name_unknown(self, scores: ScoreMap) -> None:
        """Add to what is skipped the layers whose relevance is unknown."""
        known = {entry.name for entry in self.skipped}
        for name in scores.unknown:
            layer = name.rpartition(".")[0] or name
            if layer not in known:
                reason = "relevance unknown (not reached by an ordinary layer call): never pruned, largest bit width"
                self.skipped.append(Skipped(layer, reason))


def _finite_gradients(optimizer: Optimizer) -> bool:
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    return not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
