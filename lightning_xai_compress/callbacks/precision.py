"""The stage that says when and how finely to quantize."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.calibration import calibration_batches
from lightning_xai_compress.callbacks.clock import Moment, check_moment
from lightning_xai_compress.callbacks.scoring import RelevanceScoring
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Planned, Stage
from lightning_xai_compress.checks import check_names
from lightning_xai_compress.plan import ScoreMap
from lightning_xai_compress.quantization import FakeActivations, allocate_bits, check_bits, quantizable

__all__ = ["MixedPrecision", "Quantization"]

_RANGE_SAMPLES = 256


@dataclass(frozen=True)
class Quantization:
    """How quantized training is done.

    Args:
        activations: "int8": layers also read activations of 8 bits from the start of quantized training, as an ONNX
            file with `Files(activations="int8")` will compute; their ranges are measured at that moment and at the
            start of every epoch. None: floats. The packed file and `pt2` compute with floats either way.

    Raises:
        ValueError: Anything else.
    """

    activations: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        if self.activations not in (None, "int8"):
            raise ValueError(f"activations must be None or 'int8', got {self.activations!r}")


class MixedPrecision(CompressionCallback, Stage):
    """Quantize with more bits for more relevance, per output channel, and train on the quantized values from then on.

    Without `RelevanceScoring` it scores for itself.

    Args:
        average_bits: Mean width over all compressible weights, pruned ones included.
        bits: Widths to choose from, each in 2..8.
        start: When quantized training begins: epochs (whole number), a share of the fit, or steps ("1500 steps").
        exclude: Shell-style patterns of layers to leave alone.
        quantization: Whether activations are quantized, too.

    Raises:
        ValueError: A setting out of range; (in fit) a start past its end.
    """

    rank: ClassVar[int] = 2
    needs_scores: ClassVar[bool] = True

    def __init__(
        self,
        *,
        average_bits: float = 4.0,
        bits: Sequence[int] = (2, 3, 4, 6, 8),
        start: Moment = 0.6,
        exclude: Sequence[str] = (),
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, average_bits)
        self.average_bits = average_bits
        self.start = check_moment("start of quantization", start)
        self.exclude = check_names("exclude", exclude)
        self.quantization = quantization or Quantization()
        self.activations: FakeActivations | None = None
        self._ranges: dict[str, tuple[float, float]] = {}
        self.position = 0
        self._done = False

    def __getstate__(self) -> dict[str, Any]:
        """For `ddp_spawn`: without the hooks on the layers of an earlier fit."""
        return {**super().__getstate__(), "activations": None}

    def stages(self) -> list[Stage]:
        """This one."""
        return [self]

    def begin(self, session: Session) -> None:
        """Find the batch at which it begins."""
        self.position = session.clock.check("start of quantization", self.start)
        if self.quantization.activations:
            self.activations = FakeActivations(quantizable(session.module, session.latent.parameters))
            self.activations.ranges = dict(self._ranges)

    def phases(self) -> list[tuple[int, str]]:
        """Where quantized training begins."""
        return [(self.position, "quantized training")]

    def planned(self, batch: int) -> Planned:
        """The budget, once it begins."""
        return Planned(bits=self.average_bits if batch >= self.position else None)

    def advance(self, session: Session, batch: int) -> None:
        """Allocate bits once, at the start of the phase; measure ranges then and at every epoch."""
        if self._done or batch < self.position:
            if self._done and session.epoch_begins:
                self._measure_ranges(session)
            return
        session.start(batch)
        scoring = session.stage(RelevanceScoring)
        chosen = scoring is not None and scoring.relevance_epochs is not None
        scores = session.scores if chosen and session.scores is not None else session.rescore(batch)
        self._done = True
        if scores is None:
            session.record("not quantized", batch, "not quantized: there is no finite relevance to allocate bits by")
            return
        weights = {name: parameter.detach() for name, parameter in session.latent.parameters.items()}
        allocation, scales = allocate_bits(weights, scores, average_bits=self.average_bits, bits=self.bits)
        session.latent.apply_bits(allocation, scales)
        channels = Counter(int(width) for tensor in allocation.bits.values() for width in tensor)
        spread = ", ".join(f"{count} at {width}" for width, count in sorted(channels.items()))
        session.record(
            "quantized",
            batch,
            f"quantized to {allocation.average_bits:.2f} bits on average (channels: {spread})",
            average_bits=allocation.average_bits,
        )
        self._measure_ranges(session)

    def _measure_ranges(self, session: Session) -> None:
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
        """Layers of unknown relevance take the largest width; the budget must leave room for the others."""
        sizes = {name: tensor.numel() for name, tensor in scores.score.items()}
        forced = sum(size * self.bits[-1 if name in scores.unknown else 0] for name, size in sizes.items())
        if forced > self.average_bits * sum(sizes.values()) * (1 + 1e-9):
            raise ValueError(
                f"average_bits={self.average_bits} cannot be met: relevance does not reach "
                f"{', '.join(scores.unknown[:4])}, which keep {self.bits[-1]} bits; that alone makes the mean "
                f"{forced / sum(sizes.values()):.2f}. Raise average_bits, or exclude those layers"
            )

    @property
    def complete(self) -> bool:
        """Whether the weights are on their grids."""
        return self._done

    def state(self) -> dict[str, Any]:
        """Whether it has begun."""
        ranges = self._ranges if self.activations is None else self.activations.ranges
        return {"done": self._done, **({"ranges": dict(ranges)} if ranges else {})}

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        self._done = state.get("done", False)
        self._ranges = {name: (low, high) for name, (low, high) in state.get("ranges", {}).items()}
