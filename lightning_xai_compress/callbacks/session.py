"""The state of one fit that the stages share: clock, latents, latest scores, and what has been done so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer

from lightning_xai_compress.callbacks.calibration import (
    calibration_batches,
    forward,
    tracked_norms,
    training_batch_size,
    update_batchnorm,
)
from lightning_xai_compress.callbacks.clock import clock_of
from lightning_xai_compress.callbacks.console import progress
from lightning_xai_compress.callbacks.latent import LatentCopy
from lightning_xai_compress.callbacks.outline import schedule_table
from lightning_xai_compress.callbacks.stage import Scoring, Stage
from lightning_xai_compress.criteria import Criterion, criterion_name, score
from lightning_xai_compress.errors import NonFiniteError, RelevanceError
from lightning_xai_compress.layers import find_layers
from lightning_xai_compress.plan import ScoreMap, Skipped
from lightning_xai_compress.relevance import Explain, Statistic, evaluation

__all__ = ["Session"]

_BATCHNORM_SAMPLES = 4096


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
        self.module = module
        self.stages = sorted(stages, key=lambda stage: stage.rank)
        # a layer that one stage excludes is left alone by all: no layer is half compressed
        layers = find_layers(module, exclude=sorted({pattern for stage in stages for pattern in stage.exclude}))
        parameters = dict(module.named_parameters())
        self.latent = LatentCopy({name: parameters[name] for name in layers.names})
        self.skipped = list(layers.skipped)
        self.scoring = Scoring()
        self.criterion: str | Criterion = "lrp"
        self.keeps_scores = False
        self.scores: ScoreMap | None = None
        self.history: list[dict[str, Any]] = []
        self.halted = ""
        self.started = False
        self._warned = False
        self.epoch_begins = False
        self._shares: dict[str, float] = {}
        self.clock = clock_of(trainer)
        self._norms = tracked_norms(module)
        self._norms_of_step = -1
        self._norm_buffers: list[tuple[Tensor, Tensor]] = []
        self.open = True
        self._load(restored)

    def begin(self) -> None:
        """Check everything once, then watch the optimizers.

        Raises:
            ValueError, CompressionError: What is wrong, before the first batch.
        """
        for stage in self.stages:
            stage.begin(self)
        if any(stage.needs_scores for stage in self.stages):
            scores = self._probe()
            for stage in self.stages:
                stage.check_scores(scores)
        self.latent.attach(self.trainer.optimizers)
        if self.trainer.is_global_zero:
            print(f"\n{schedule_table(self.module, self.clock, self.stages, self.latent.parameters)}\n")

    def advance(self, batch_idx: int) -> None:
        """Let every stage do what is due at this batch of the epoch."""
        self.epoch_begins = batch_idx == 0
        for stage in self.stages:
            stage.advance(self, self.position(batch_idx))
        if not self._norm_buffers:  # else the last step was dropped, and these are still the last good ones
            self._norm_buffers = [(each, each.clone()) for norm in self._norms for each in norm.buffers()]

    def finish(self) -> None:
        """BatchNorm, then the stages' last words."""
        self.latent.settle()
        self.refresh_batchnorm()
        for stage in self.stages:
            stage.finish(self)

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

    def position(self, batch_idx: int) -> int:
        """Batches since the start of the fit."""
        if self.clock.epoch_batches is None:
            return self.trainer.fit_loop.epoch_loop.total_batch_idx
        return self.trainer.current_epoch * self.clock.epoch_batches + batch_idx

    def epoch(self, batch: int) -> float:
        """Epochs done at a batch."""
        known = self.clock.epoch_of(batch)
        return self.trainer.current_epoch if known is None else round(known, 4)

    def epoch_after_batch(self) -> float:
        """Epochs done when the batch that trains now is over."""
        return self.epoch(self.position(self.trainer.fit_loop.epoch_loop.batch_idx + 1))

    def start(self, batch: int) -> None:
        """Tell all stages, once, that the weights are about to change."""
        if not self.started:
            self.started = True
            for stage in self.stages:
                stage.before_compression(self, batch)

    def rescore(self, batch: int) -> ScoreMap | None:
        """Score all layers on training samples; None, and a halt, where relevance is not finite or nowhere."""
        samples = self.scoring.samples
        total = max(1, -(-samples // training_batch_size(self.trainer)))
        seed = self.scoring.seed * 1_000_003 + batch
        try:
            self._agree_on_buffers()
            with progress(self.trainer, "relevance", total) as advance:
                batches = calibration_batches(self.trainer, samples=samples, seed=seed)
                scores = self.score(batches, seed=seed, on_batch=advance)
        except NonFiniteError as error:
            self.halt(f"relevance is not finite: {error}")
            return None
        except RelevanceError as error:
            self.halt(f"weights could not be scored: {error}")
            return None
        scores = self._agree_on_scores(scores)
        sums = {
            name: float(scores.relevance[name].abs().nansum()) for name in scores.score if name not in scores.unknown
        }
        if sum(sums.values()) == 0:
            self.halt("relevance is zero everywhere: what is explained does not depend on the weights")
            return None
        self.scores = scores
        self._shares = {name: value / sum(sums.values()) for name, value in sums.items()}
        return scores

    def score(
        self,
        batches: Iterable[Any],
        *,
        seed: int,
        criterion: str | Criterion | None = None,
        explain: Explain | None = None,
        statistics: Sequence[Statistic] | None = None,
        heatmaps: int = 0,
        on_batch: Callable[[], None] | None = None,
    ) -> ScoreMap:
        """Score some batches by the criterion and the settings of this fit, where no others are given."""
        with ExitStack() as stack:
            for stage in self.stages:
                stack.enter_context(stage.float_activations())
            return score(
                self.module,
                batches,
                self.criterion if criterion is None else criterion,
                composite=self.scoring.composite,
                explain=explain or self.scoring.explain,
                statistics=self.scoring.statistics if statistics is None else statistics,
                epsilon=self.scoring.epsilon,
                attention=self.scoring.attention,
                baseline=self.scoring.baseline,
                layers=tuple(self.latent.parameters),
                heatmaps=heatmaps,
                seed=seed,
                on_batch=on_batch,
            )

    @torch.no_grad()
    def run(self, batches: Iterable[Any]) -> None:
        """Forward passes in evaluation mode, for what layers see of them."""
        with isolate_rng(), self.trainer.precision_plugin.forward_context(), evaluation(self.module):
            for index, batch in enumerate(batches):
                forward(self.module, batch, index)

    def _agree_on_buffers(self) -> None:
        """BatchNorm statistics of rank 0, as DDP itself takes them: scores are made in evaluation mode."""
        if self.trainer.world_size > 1:
            for buffer in self.module.buffers():
                buffer.copy_(self.trainer.strategy.broadcast(buffer))

    def _agree_on_scores(self, scores: ScoreMap) -> ScoreMap:
        """The mean over ranks, which all score the same samples: equal to the last bit, whatever the devices did."""
        if self.trainer.world_size == 1:
            return scores

        def mean(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: self.trainer.strategy.reduce(tensor, reduce_op="mean") for name, tensor in tensors.items()}

        return replace(
            scores,
            score=mean(scores.score),
            relevance=mean(scores.relevance),
            sensitivity=mean(scores.sensitivity),
        )

    @property
    def provenance(self) -> dict[str, str]:
        """How the model was made, for the files."""
        return {"model": type(self.module).__qualname__, "criterion": criterion_name(self.criterion)}

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
        self.history.append({"event": event, "epoch": self.epoch(batch), **facts})
        rank_zero_info(f"[compression] epoch {self.epoch(batch):.2f}: {message}")

    # --- during training

    def on_epoch_start(self) -> None:
        """Remember which BatchNorm layers train, since validation shows all in evaluation mode."""
        self._norms = tracked_norms(self.module)

    def before_step(self, optimizer: Optimizer) -> None:
        """Keep a step with non-finite gradients away from the weights; a gradient scaler does that itself."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if not scaled and not _finite_gradients(optimizer):
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, good in self._norm_buffers:
                    buffer.copy_(good)
            self._not_finite(
                f"loss or gradients are not finite at step {self.trainer.global_step}; such steps are left out"
            )
        else:
            self._norm_buffers = []
        self.latent.before_step(optimizer)

    def after_batch(self, outputs: Any) -> None:
        """Close what a skipped step left open; a gradient scaler hides a loss that is not finite, so look at it."""
        self.latent.settle()
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and not torch.isfinite(loss).all():
            self._not_finite(f"loss is not finite before step {self.trainer.global_step}")

    def _not_finite(self, reason: str) -> None:
        if self.started:
            self.halt(reason)
        elif not self._warned:  # a stumble in the warm-up need not cost the compression
            self._warned = True
            rank_zero_warn(f"before compression began: {reason}")

    def refresh_batchnorm(self) -> None:
        """Estimate BatchNorm statistics of compressed weights anew, once per set of weights."""
        changed = self.latent.keep or self.latent.quantized
        if not changed or self._norms_of_step == self.trainer.global_step or not self._norms:
            return
        self._norms_of_step = self.trainer.global_step
        validating = self.trainer.validating
        self.trainer.training = True  # the batch hooks ask, and these are training batches
        try:
            with isolate_rng(), self.trainer.precision_plugin.forward_context():
                update_batchnorm(
                    self.module,
                    self._norms,
                    calibration_batches(self.trainer, samples=_BATCHNORM_SAMPLES, seed=self.trainer.global_step),
                )
            self._agree_on_buffers()
        finally:
            if validating:
                self.trainer.validating = True

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types."""
        state: dict[str, Any] = {
            "start": self.clock.start,
            "latent": self.latent.state_dict(),
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
        self.history = list(state["history"])
        self.skipped = [Skipped(**entry) for entry in state["skipped"]]
        self.halted = state["halted"]
        self.started = state["started"]
        self._shares = dict(state["relevance_shares"])
        if "scores" in state:
            self.scores = ScoreMap(**state["scores"])

    def _probe(self) -> ScoreMap:
        """Score one batch: finds a batch that is not understood, and layers that get no relevance."""
        batches = calibration_batches(self.trainer, samples=1, seed=self.scoring.seed)
        try:
            # the margin: logits may all be negative before training
            scores = self.score(batches, seed=self.scoring.seed, explain="margin", statistics=("rms",))
        except NonFiniteError as error:
            raise NonFiniteError(f"relevance is not finite before the first batch: {error}") from error
        known = {entry.name for entry in self.skipped}
        for name in scores.unknown:
            layer = name.rpartition(".")[0] or name
            if layer not in known:
                reason = "relevance unknown (not reached by an ordinary layer call): never pruned, largest bit width"
                self.skipped.append(Skipped(layer, reason))
        return scores


def _finite_gradients(optimizer: Optimizer) -> bool:
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    return not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
