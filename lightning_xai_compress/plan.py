"""The nouns that the stages hand on: scores, masks, bit widths, and the plan that unites them.

All are keyed by parameter name as `Module.named_parameters` gives it, hold detached tensors on the CPU or on the
parameter's device, and are validated once, when they are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["MAX_BITS", "MIN_BITS", "BitAllocation", "CompressionPlan", "Mask", "ScoreMap", "Skipped"]

MIN_BITS = 2
MAX_BITS = 8


@dataclass(frozen=True)
class Skipped:
    """A layer (or parameter) that is left alone, wholly or in part, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ScoreMap:
    """What a scoring pass found out about every weight. NaN means unknown, and unknown is never pruned.

    Args:
        score: Importance that ranks weights, >= 0, shape of the weight.
        relevance: Signed relevance R, mean over samples, shape of the weight.
        sensitivity: Mean over samples of (R / w)^2, >= 0, shape of the weight: what one unit of squared error costs.
        samples: Number of samples that were seen.

    Raises:
        ValueError: The three maps differ in names or shapes, or hold infinite values.
    """

    score: Mapping[str, Tensor]
    relevance: Mapping[str, Tensor]
    sensitivity: Mapping[str, Tensor]
    samples: int

    def __post_init__(self) -> None:
        for label, tensors in (("relevance", self.relevance), ("sensitivity", self.sensitivity)):
            if tensors.keys() != self.score.keys():
                raise ValueError(f"score and {label} name different parameters: {sorted(self.score)} {sorted(tensors)}")
            for name, tensor in tensors.items():
                if tensor.shape != self.score[name].shape:
                    raise ValueError(f"{label} of {name} has shape {tuple(tensor.shape)}, its score another")
        for name, tensor in self.score.items():
            if torch.isinf(tensor).any():
                raise ValueError(f"score of {name} holds infinite values")

    @property
    def unknown(self) -> list[str]:
        """Names of the parameters of which no weight has a score."""
        return [name for name, tensor in self.score.items() if bool(torch.isnan(tensor).all())]


@dataclass(frozen=True)
class Mask:
    """Which weights stay: boolean tensors in the shape of the weights, True = kept, False = exactly zero."""

    keep: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, tensor in self.keep.items():
            if tensor.dtype != torch.bool:
                raise ValueError(f"mask of {name} must be boolean, not {tensor.dtype}")

    def __getitem__(self, name: str) -> Tensor:
        return self.keep[name]

    @property
    def pruned(self) -> int:
        """Number of weights that are gone."""
        return sum(int((~tensor).sum()) for tensor in self.keep.values())

    @property
    def sparsity(self) -> float:
        """Share of pruned weights, in [0, 1]."""
        total = sum(tensor.numel() for tensor in self.keep.values())
        return self.pruned / total if total else 0.0


@dataclass(frozen=True)
class BitAllocation:
    """Bit width of every output channel.

    Args:
        bits: uint8 tensors of shape [channels], values in 2..8.
        channel_size: Number of weights in one channel of each parameter.

    Raises:
        ValueError: A width outside 2..8.
    """

    bits: Mapping[str, Tensor]
    channel_size: Mapping[str, int]

    def __post_init__(self) -> None:
        for name, tensor in self.bits.items():
            if tensor.numel() and not MIN_BITS <= int(tensor.min()) <= int(tensor.max()) <= MAX_BITS:
                raise ValueError(f"bit widths of {name} must lie in {MIN_BITS}..{MAX_BITS}, got {tensor.unique()}")

    def __getitem__(self, name: str) -> Tensor:
        return self.bits[name]

    @property
    def average_bits(self) -> float:
        """Mean width over all weights, pruned ones included."""
        total = sum(tensor.numel() * self.channel_size[name] for name, tensor in self.bits.items())
        spent = sum(int(tensor.sum(dtype=torch.int64)) * self.channel_size[name] for name, tensor in self.bits.items())
        return spent / total if total else 0.0


@dataclass(frozen=True)
class CompressionPlan:
    """All that was decided about a model: what formats need beside the model itself.

    Args:
        mask: Which weights stay.
        allocation: Bit width of each output channel; None while nothing is quantized.
        scales: Step of the grid of each output channel, float32 of shape [channels], exactly representable in
            bfloat16, >= 0. A weight equals its integer code times the scale, codes within +-(2^(bits-1) - 1).
        skipped: What was left alone, and why.
    """

    mask: Mask
    allocation: BitAllocation | None = None
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        quantized = set(self.allocation.bits) if self.allocation else set()
        if quantized != set(self.scales):
            raise ValueError(f"scales and bit widths name different parameters: {sorted(quantized ^ set(self.scales))}")
