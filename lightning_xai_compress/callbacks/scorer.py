"""Scores of a fit's weights, from its own training samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_xai_compress.callbacks.calibration import calibration_batches, training_batch_size
from lightning_xai_compress.callbacks.console import progress
from lightning_xai_compress.callbacks.processes import Processes
from lightning_xai_compress.callbacks.stage import Scoring, Stage
from lightning_xai_compress.criteria import SUMMED, Criterion, score
from lightning_xai_compress.errors import NonFiniteError
from lightning_xai_compress.plan import ScoreMap
from lightning_xai_compress.relevance import Baseline, Explain, Statistic, mean_inputs

__all__ = ["Scorer"]


class Scorer:
    """Scores by the settings of `RelevanceScoring`, or by the defaults where a fit has none.

    Args:
        trainer: In fit.
        module: The user's module.
        processes: Those of the fit.
        stages: All of the fit: while scores are made, the model computes with float activations.
        layers: Names of the weights.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        processes: Processes,
        stages: Sequence[Stage],
        layers: Sequence[str],
    ) -> None:
        self.settings = Scoring()
        self.criterion: str | Criterion = "lrp"
        self._trainer = trainer
        self._module = module
        self._processes = processes
        self._stages = stages
        self._layers = tuple(layers)

    def score(
        self,
        batches: Iterable[Any],
        *,
        seed: int,
        criterion: str | Criterion | None = None,
        explain: Explain | None = None,
        statistics: Sequence[Statistic] | None = None,
        heatmaps: int = 0,
        processes: Processes | None = None,
        on_batch: Callable[[], None] | None = None,
    ) -> ScoreMap:
        """Score some batches by the criterion and the settings of this fit, where no others are given."""
        criterion = self.criterion if criterion is None else criterion
        baseline: Baseline = self.settings.baseline
        if criterion == "deeplift" and isinstance(baseline, str) and baseline == "mean":  # of all processes' samples
            baseline = mean_inputs(calibration_batches(self._trainer, samples=self.settings.samples, seed=seed))
        with ExitStack() as stack:
            for stage in self._stages:
                stack.enter_context(stage.float_activations())
            return score(
                self._module,
                batches,
                criterion,
                composite=self.settings.composite,
                explain=explain or self.settings.explain,
                statistics=self.settings.statistics if statistics is None else statistics,
                epsilon=self.settings.epsilon,
                attention=self.settings.attention,
                baseline=baseline,
                layers=self._layers,
                heatmaps=heatmaps,
                seed=seed,
                processes=processes,
                on_batch=on_batch,
            )

    def training_samples(
        self, batch: int, *, criterion: str | Criterion | None = None, explain: Explain | None = None
    ) -> ScoreMap:
        """Score training samples, which the number of a batch chooses; shared out over the processes.

        Args:
            batch: Of the fit.
            criterion, explain: Others than those of this fit.

        Raises:
            RelevanceError: On all processes, whichever met it.
        """
        samples = self.settings.samples
        seed = self.settings.seed * 1_000_003 + batch
        # what adds up over samples is shared out; all else every process does alike
        criterion = self.criterion if criterion is None else criterion
        shared = isinstance(criterion, str) and criterion in SUMMED
        shard = (self._processes.rank, self._processes.world) if shared else (0, 1)
        total = max(1, -(-samples // (training_batch_size(self._trainer) * shard[1])))
        self._processes.share_buffers(self._module)  # scores are made in evaluation mode
        with progress(self._trainer, "relevance", total) as advance:
            batches = calibration_batches(self._trainer, samples=samples, seed=seed, shard=shard)
            if shard[1] > 1:
                return self.score(
                    batches,
                    seed=seed,
                    criterion=criterion,
                    explain=explain,
                    processes=self._processes,
                    on_batch=advance,
                )
            with self._processes.together():
                scores = self.score(batches, seed=seed, criterion=criterion, explain=explain, on_batch=advance)
            return self._processes.alike(scores)

    def probe(self) -> ScoreMap:
        """Score one batch: finds a batch that is not understood, and layers that get no relevance.

        Raises:
            RelevanceError: What is wrong, before training.
        """
        batches = calibration_batches(self._trainer, samples=1, seed=self.settings.seed)
        try:
            # the margin: logits may all be negative before training
            asked = [each for each in self.settings.statistics if each != "standard_error"]  # of a single batch
            return self.score(batches, seed=self.settings.seed, explain="margin", statistics=asked)
        except NonFiniteError as error:
            raise NonFiniteError(f"relevance is not finite before the first batch: {error}") from error
