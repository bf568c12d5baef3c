"""All stages in one callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torchmetrics import Metric

from lightning_xai_compress.callbacks.accuracy_budget import AccuracyBudget
from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.best import Mode
from lightning_xai_compress.callbacks.budget import Budget, SizeBudget
from lightning_xai_compress.callbacks.channels import ChannelPruning, Channels
from lightning_xai_compress.callbacks.clock import Moment, check_moment
from lightning_xai_compress.callbacks.distillation import DenseTeacher, Distillation
from lightning_xai_compress.callbacks.export import CompressedExport
from lightning_xai_compress.callbacks.precision import MixedPrecision, Quantization
from lightning_xai_compress.callbacks.pruning import Pruning, RelevancePruning
from lightning_xai_compress.callbacks.scoring import RelevanceScoring
from lightning_xai_compress.callbacks.stage import Scoring, Stage
from lightning_xai_compress.formats import Files
from lightning_xai_compress.pruning import SelectionRule
from lightning_xai_compress.report import Report

__all__ = ["XAICompression"]


class XAICompression(CompressionCallback):
    """Compress a model while it trains, by what its decisions rest on.

    Warm-up, then pruning by relevance, then training on quantized weights, then export: `RelevanceScoring`,
    `RelevancePruning`, `MixedPrecision` and `CompressedExport` in one. After Soroush, Raji & Ghavami (2023),
    arXiv 2507.05286; what that abstract leaves open is chosen here, see docs/.

    Args:
        sparsity: Share of the compressible weights to be zero at the end, in [0, 1); None to stop where the
            non-positive set is exhausted.
        average_bits: Mean bit width over all compressible weights, pruned ones included; None: 4, or what suits the
            budget.
        target_size: Instead of a sparsity: share of the dense file in (0, 1), or a number of bytes, that the packed
            file shall have, see `SizeBudget`.
        max_drop: Instead of a sparsity: compress as far as `metric` loses no more than so many points, see
            `AccuracyBudget`.
        criterion: What weights are scored by: "lrp", "deeplift", "taylor", "fisher", "wanda", "magnitude", "lamp",
            "random", or a function `(model, batches, layers)` of your own or its import path, see `score`.
        selection: "nonpositive", "least" or "literal", see `RelevancePruning`.
        bits: Widths to choose from, each in 2..8.
        warmup: When pruning begins: epochs (whole number), a share of the fit in [0, 1), or optimizer steps as a text
            such as "1500 steps"; 0 for a model that comes trained.
        pruning_end: When pruning is done and quantized training begins: epochs, share or steps.
        relevance_epochs: Epochs at whose start relevance is computed: a list, or every n; by default before each use.
        metric: A torchmetrics metric to measure on the validation data, or the name of one that the module logs.
        export: "last" or "best": which weights the files hold, see `CompressedExport`.
        mode: Whether "max" or "min" of the metric is best.
        exclude: Shell-style patterns of layers to leave alone.
        export_dir: Folder for the files and `report.json`.
        formats: "safetensors", "onnx", "pt2".
        scoring: How relevance is computed: Scoring(explain, composite, attention, statistics, epsilon, baseline,
            samples, seed).
        pruning: How patiently weights are pruned, and what stays: Pruning(steps, schedule, milestones, rescore_every,
            scope, floor, confidence, normalization, protect, protect_ends, fresh_batchnorm).
        quantization: Who gets how many bits (strategy, per layer, channel or group, widths by name), and whether layers
            read activations of 8 bits, too: Quantization(activations, strategy, bits_per, group_size, sensitivity,
            quantizer, codebook_channels, widths).
        files: How files are written (integer types, 8-bit activations, float16, BatchNorm merged): Files(onnx_bits,
            activations, ranges, float16, merge_batchnorm).
        structure: "channel": whole channels go, too, and files hold a smaller module, see `ChannelPruning`; None: not.
        channels: How many channels, and which: Channels(macs, parameters, channels, score, multiple, floor, steps,
            protect).
        distillation: Let the dense model teach, see `DenseTeacher`: Distillation(weight, temperature, outputs,
            module, class_axis); None: not.

    Raises:
        ValueError: A setting out of range; the text says which, what came and what is expected.
        ImportError: The extra that a format needs is not installed.
    """

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        average_bits: float | None = None,
        target_size: float | int | None = None,
        max_drop: float | None = None,
        criterion: str | Callable[..., Any] = "lrp",
        selection: SelectionRule | None = None,
        bits: Sequence[int] = (2, 3, 4, 6, 8),
        warmup: Moment = 0.25,
        pruning_end: Moment = 0.6,
        relevance_epochs: int | list[int] | None = None,
        metric: Metric | str | None = None,
        export: Literal["last", "best"] = "last",
        mode: Mode | None = None,
        exclude: Sequence[str] = (),
        export_dir: str | None = None,
        formats: Sequence[str] = ("safetensors",),
        scoring: Scoring | None = None,
        pruning: Pruning | None = None,
        quantization: Quantization | None = None,
        files: Files | None = None,
        structure: Literal["channel"] | None = None,
        channels: Channels | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        check_moment("warmup", warmup)
        check_moment("pruning_end", pruning_end)
        self._scoring = RelevanceScoring(relevance_epochs=relevance_epochs, criterion=criterion, scoring=scoring)
        self._pruning = RelevancePruning(
            sparsity=sparsity, selection=selection, start=warmup, end=pruning_end, exclude=exclude, pruning=pruning
        )
        self._precision = MixedPrecision(
            average_bits=average_bits, bits=bits, start=pruning_end, exclude=exclude, quantization=quantization
        )
        if structure not in (None, "channel"):
            raise ValueError(f"structure must be None or 'channel', got {structure!r}")
        if channels is not None and structure is None:
            raise ValueError("channels=... says which channels go: add structure='channel', or leave it out")
        self._channels = (
            None if structure is None else ChannelPruning(channels, start=warmup, end=pruning_end, exclude=exclude)
        )
        self._budget = _budget(target_size, max_drop)
        self._teacher = None if distillation is None else DenseTeacher(distillation, start=warmup)
        self._export = CompressedExport(
            export_dir=export_dir, formats=formats, metric=metric, export=export, mode=mode, files=files
        )

    def stages(self) -> list[Stage]:
        """All four, and channels, budget and teacher where they are asked for."""
        own: list[Stage] = [self._scoring, self._pruning, self._precision, self._export]
        return own + [stage for stage in (self._channels, self._budget, self._teacher) if stage is not None]

    @property
    def report(self) -> Report | None:
        """The report of the last fit; None before, and where that raised an error.

        Every process of the fit has it, and with `ddp_spawn` and the like also the one that asked for the fit.
        """
        return self._export.report


def _budget(target_size: float | int | None, max_drop: float | None) -> Budget | None:
    if target_size is not None and max_drop is not None:
        raise ValueError(
            f"target_size={target_size} and max_drop={max_drop} contradict each other: one fixes the size and lets the "
            "metric drop, the other the reverse; give one of them"
        )
    if target_size is not None:
        return SizeBudget(target_size)
    return None if max_drop is None else AccuracyBudget(max_drop)
