"""The stage that says when and how finely to quantize."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.calibration import calibration_batches
from lightning_xai_compress.callbacks.clock import Moment, check_moment
from lightning_xai_compress.callbacks.quantization_settings import Quantization
from lightning_xai_compress.callbacks.scoring import RelevanceScoring
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Planned, Stage
from lightning_xai_compress.checks import check_names
from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.formats import entropy_price
from lightning_xai_compress.plan import BitAllocation, ScoreMap
from lightning_xai_compress.quantization import (
    Allocated,
    FakeActivations,
    WidthCosts,
    allocate_bits,
    block_count,
    check_bits,
    fixed_widths,
    measure_widths,
    quantizable,
    row_count,
)
from lightning_xai_compress.structure import shrunk_plan, shrunk_scores, shrunk_weights

__all__ = ["MixedPrecision", "Quantization"]

_AVERAGE_BITS = 4.0
_RANGE_SAMPLES = 256


class MixedPrecision(CompressionCallback, Stage):
    """Quantize with more bits for more relevance, and train on the quantized values from then on.

    Without `RelevanceScoring` it scores for itself.

    Args:
        average_bits: Mean width over all compressible weights, pruned ones included; None: 4 (or the nearest that
            `bits` allow), unless a budget decides.
        bits: Widths to choose from, each in 2..8.
        start: When quantized training begins: epochs (whole number), a share of the fit, or steps ("1500 steps").
        exclude: Shell-style patterns of layers to leave alone.
        quantization: Who gets how many bits, and whether activations are quantized, too.

    Raises:
        ValueError: A setting out of range; (in fit, before training) a start past its end, a pattern or a group size
            that fits no layer, widths that must be and exceed the budget.
    """

    rank: ClassVar[int] = 3
    needs_scores: ClassVar[bool] = True

    def __init__(
        self,
        *,
        average_bits: float | None = None,
        bits: Sequence[int] = (2, 3, 4, 6, 8),
        start: Moment = 0.6,
        exclude: Sequence[str] = (),
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.quantization = quantization or Quantization()
        self.bits = check_bits(bits, average_bits, self.quantization.widths.values())
        self.given_bits = average_bits
        self.average_bits = (
            min(max(_AVERAGE_BITS, self.bits[0]), self.bits[-1]) if average_bits is None else average_bits
        )
        self.start = check_moment("start of quantization", start)
        self.exclude = check_names("exclude", exclude)
        self.activations: FakeActivations | None = None
        self._ranges: dict[str, tuple[float, float]] = {}
        self._budget: Any = None
        self._fisher: tuple[ScoreMap | None, ScoreMap] | None = None  # beside the scores that it goes with
        self._scored: ScoreMap | None = None  # by which widths were chosen, until they are applied
        self.position = 0
        self._led = False
        self._done = False

    def __getstate__(self) -> dict[str, Any]:
        """For `ddp_spawn`: without the hooks on the layers of an earlier fit."""
        return {**super().__getstate__(), "activations": None, "_budget": None}

    def stages(self) -> list[Stage]:
        """This one."""
        return [self]

    def begin(self, session: Session) -> None:
        """Find the batch at which it begins."""
        self.position, self._led = session.clock.check("start of quantization", self.start), session.led
        self._budget = session.budget
        if self.quantization.activations:
            self.activations = FakeActivations(quantizable(session.module, session.latent.parameters))
            self.activations.ranges = dict(self._ranges)

    def check_integer_kernels(self, session: Session) -> None:
        """Say which layers an ONNX file with 8-bit activations computes with floats; refuse where that is all."""
        if self.quantizer_is_shared:
            raise ValueError(
                "Files(activations='int8') computes on integers, which a codebook's values are not: leave it out, or "
                "use quantizer='uniform'"
            )
        group, weights = self.quantization.group_size, session.latent.parameters
        grouped = [name for name, weight in weights.items() if row_count(weight, group) > len(weight)]
        if not grouped:
            return
        text = (
            f"group_size={group}: integer kernels take one scale an output channel, so that an ONNX file with 8-bit "
            f"activations computes with floats in {', '.join(grouped[:4])}"
            + (f" and {len(grouped) - 4} more" if len(grouped) > 4 else "")
        )
        if len(grouped) == len(weights):
            raise ValueError(f"{text}, which is all: use bits_per='channel', or Files without activations")
        rank_zero_warn(text)

    @property
    def quantizer_is_shared(self) -> bool:
        """Whether layers have codebooks."""
        return self.quantization.quantizer == "codebook"

    def importance(self, session: Session, scores: ScoreMap | None) -> Mapping[str, Tensor]:
        """What weighs the means of shared values; nothing for grids, or where all weights count the same."""
        sensitivity = self._sensitivity(session, scores) if self.quantizer_is_shared else None
        found = {} if sensitivity is None else sensitivity.sensitivity
        return {name: torch.where(each.isnan(), each.nanmean(), each).nan_to_num(1.0) for name, each in found.items()}

    def phases(self) -> list[tuple[int, str]]:
        """Where quantized training begins."""
        return [] if self._led else [(self.position, "quantized training")]

    def planned(self, batch: int) -> Planned:
        """The budget, once it begins."""
        return Planned(bits=self.average_bits if batch >= self.position else None)

    def advance(self, session: Session, batch: int) -> None:
        """Allocate bits once, at the start of the phase; measure ranges then and at every epoch."""
        if self._done or self._led or batch < self.position:
            if session.epoch_begins:
                self.measure_ranges(session)
            return
        session.start(batch)
        found = self._allocated_now(session, batch)
        self._done = True
        if found is None:
            session.record("not quantized", batch, "not quantized: there is no finite relevance to allocate bits by")
            return
        importance = self.importance(session, self._scored)
        session.latent.apply_bits(found.allocation, found.scales, found.codebooks, importance)
        self._scored = self._fisher = None
        rows = Counter(int(width) for tensor in found.allocation.bits.values() for width in tensor)
        spread = ", ".join(f"{count} at {width}" for width, count in sorted(rows.items()))
        plan = session.latent.plan()
        with session.smaller() as kept:
            left = shrunk_plan(plan, kept).allocation
        average = (left or found.allocation).average_bits
        session.record(
            "quantized",
            batch,
            f"quantized to {average:.2f} bits on average ({'groups' if self.quantization.group_size else 'channels'}: "
            f"{spread}); another choice could save at most {found.gap:.2%} of the weighted error",
            average_bits=average,
            gap=found.gap,
        )
        self.measure_ranges(session)

    def _allocated_now(self, session: Session, batch: int) -> Allocated | None:
        """Widths for the present weights; None, and a halt, where there is no finite sensitivity."""
        scores = None
        if self._uses_scores(session):
            scoring = session.stage(RelevanceScoring)
            chosen = scoring is not None and scoring.relevance_epochs is not None
            scores = session.scores if chosen and session.scores is not None else session.rescore(batch)
            if scores is None:
                return None
        try:
            if session.budget is not None:
                self._scored = scores = scores or session.rescore(batch)
                return None if scores is None else session.budget.quantized(session, scores)
            self._scored = scores
            weights = {name: parameter.detach() for name, parameter in session.latent.parameters.items()}
            return self.choose(session, scores, weights, self.average_bits)
        except RelevanceError as error:
            session.halt(f"weights could not be scored for their widths: {error}")
            return None

    def choose(
        self, session: Session, scores: ScoreMap | None, weights: Mapping[str, Tensor], average_bits: float
    ) -> Allocated:
        """Widths by the settings of this stage, for any weights and budget.

        Args:
            session: Of the fit.
            scores: By the criterion of the fit; not used where the sensitivity has another source.
            weights: Masked ones, by parameter name.
            average_bits: Mean width over all of them.

        Raises:
            RelevanceError: The pass for sensitivity="fisher" failed.
        """
        settings, sensitivity = self.quantization, self._sensitivity(session, scores)
        with session.smaller() as kept:  # weights that files do not hold have no share in the mean
            rows = {name: axes[0] for name, axes in kept.items() if 0 in axes and name in weights}
        found = allocate_bits(
            shrunk_weights(weights, kept) if kept else weights,
            shrunk_scores(sensitivity, kept) if sensitivity is not None and kept else sensitivity,
            average_bits=average_bits,
            bits=self.bits,
            strategy=settings.strategy,
            bits_per=settings.bits_per,
            group_size=settings.group_size,
            widths=settings.widths,
            quantizer=settings.quantizer,
            codebook_channels=settings.codebook_channels,
        )
        return found if not kept else _with_rows(found, weights, rows)

    def measure(self, session: Session, scores: ScoreMap | None, weights: Mapping[str, Tensor]) -> WidthCosts:
        """What every width costs, in error and in entropy-coded bits, by the settings of this stage."""
        settings = self.quantization
        return measure_widths(
            weights,
            self._sensitivity(session, scores),
            bits=self.bits,
            bits_per=settings.bits_per,
            group_size=settings.group_size,
            widths=settings.widths,
            price=entropy_price,
            quantizer=settings.quantizer,
            codebook_channels=settings.codebook_channels,
        )

    def _uses_scores(self, session: Session) -> bool:
        """Whether the scores of the fit are the sensitivity; the Fisher information is that of the margin alone."""
        fisher = session.scorer.criterion == "fisher" and session.scorer.settings.explain == "margin"
        chosen = self.quantization.sensitivity
        return chosen in ("relevance", "absolute") or (chosen == "fisher" and fisher)

    def _sensitivity(self, session: Session, scores: ScoreMap | None) -> ScoreMap | None:
        """What weighs errors; the pass for the Fisher information is made once for the same scores."""
        if self.quantization.sensitivity == "error":
            return None
        if self._uses_scores(session):
            if scores is not None and self.quantization.sensitivity == "absolute":
                return replace(scores, sensitivity=scores.absolute)
            return scores
        if self._fisher is None or self._fisher[0] is not scores:
            batch = session.position(max(session.trainer.fit_loop.epoch_loop.batch_idx, 0))
            with session.batchnorm.fresh() if session.fresh_batchnorm else nullcontext():
                found = session.scorer.training_samples(batch, criterion="fisher", explain="margin")
            if not any(bool((each > 0).any()) for each in found.sensitivity.values()):
                raise RelevanceError("the Fisher information is zero everywhere")
            self._fisher = (scores, found)
        return self._fisher[1]

    def measure_ranges(self, session: Session) -> None:
        """Ranges of what the layers read, on training samples."""
        if self.activations is not None and session.latent.quantized:
            batches = calibration_batches(
                session.trainer, samples=_RANGE_SAMPLES, seed=session.scorer.settings.seed + session.trainer.global_step
            )
            with self.activations.measuring():
                session.run(batches)
            self.activations.ranges = session.processes.shared(self.activations.ranges)

    def float_activations(self) -> AbstractContextManager[None]:
        """Inside, layers read floats."""
        return nullcontext() if self.activations is None else self.activations.paused()

    def close(self) -> None:
        """Take the hooks off the layers."""
        if self.activations is not None:
            self._ranges = dict(self.activations.ranges)
            self.activations.detach()

    def finish(self, session: Session) -> None:
        """Files are made of the model itself."""
        self.close()

    def check_scores(self, scores: ScoreMap) -> None:
        """Unknown layers take the largest width and some have theirs fixed: there must be room for the others."""
        settings = self.quantization
        fixed = fixed_widths(scores.score, settings.widths)
        group = settings.group_size
        if group is not None and all(row_count(each, group) == len(each) for each in scores.score.values()):
            inputs = sorted({each.shape[1] for each in scores.score.values()})
            raise ValueError(
                f"group_size={group} divides the input channels of no weight into groups: they have {inputs[:8]}; "
                "choose a divisor of them, or bits_per='channel'"
            )
        if settings.sensitivity == "absolute" and not scores.absolute:
            raise ValueError(
                "sensitivity='absolute' needs the mean absolute relevance of every weight, which the scores do not "
                "have: add Scoring(statistics=('rms', 'absolute')), with criterion 'lrp' or 'deeplift', or return it "
                "from your own criterion"
            )
        every = [len(each) for each in scores.score.values()]
        if settings.codebook_channels is not None and all(
            block_count(count, settings.codebook_channels) == 1 for count in every
        ):
            raise ValueError(
                f"codebook_channels={settings.codebook_channels} cuts the output channels of no weight into blocks: "
                f"they have {sorted(set(every))[:8]}; choose a divisor of them, or leave it out"
            )
        unknown = [] if settings.sensitivity == "error" else [name for name in scores.unknown if name not in fixed]
        sizes = {name: tensor.numel() for name, tensor in scores.score.items()}
        forced = sum(size * fixed.get(name, self.bits[-1 if name in unknown else 0]) for name, size in sizes.items())
        if self._budget is None and forced > self.average_bits * sum(sizes.values()) * (1 + 1e-9):
            reasons = [f"relevance does not reach {', '.join(unknown[:4])}, which keep {self.bits[-1]} bits"]
            held = ", ".join(f"{name} at {width}" for name, width in [*fixed.items()][:4])
            reasons = [*(reasons if unknown else []), *([f"widths fix {held} bits"] if fixed else [])]
            raise ValueError(
                f"average_bits={self.average_bits} cannot be met: {' and '.join(reasons)}; that alone makes the mean "
                f"{forced / sum(sizes.values()):.2f}. Raise average_bits, or exclude those layers"
                f"{', or fix smaller widths' if fixed else ''}"
            )

    @property
    def complete(self) -> bool:
        """Whether the weights are on their grids."""
        return self._done or self._led

    def state(self) -> dict[str, Any]:
        """Whether it has begun."""
        ranges = self._ranges if self.activations is None else self.activations.ranges
        return {"done": self._done, **({"ranges": dict(ranges)} if ranges else {})}

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        self._done = state.get("done", False)
        self._ranges = {name: (low, high) for name, (low, high) in state.get("ranges", {}).items()}


def _with_rows(found: Allocated, weights: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Allocated:
    """Widths and scales of the rows that are left, set among those that are gone, whose scale is zero."""
    bits, scales = dict(found.allocation.bits), dict(found.scales)
    for name, kept in rows.items():
        at = kept.to(bits[name].device)
        bits[name] = bits[name].new_full((len(weights[name]),), int(bits[name].min())).index_copy(0, at, bits[name])
        scales[name] = scales[name].new_zeros(len(weights[name])).index_copy(0, at, scales[name])
    sizes = {name: weights[name].numel() // len(each) for name, each in bits.items()}
    return replace(found, allocation=BitAllocation(bits, sizes), scales=scales)
