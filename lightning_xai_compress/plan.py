"""The nouns that the stages hand on: scores, masks, bit widths, and the plan that unites them.

All are keyed by parameter name as `Module.named_parameters` gives it, hold detached tensors on the CPU or on the
parameter's device, and are validated once, when they are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "BitAllocation",
    "CompressionPlan",
    "HeatMaps",
    "Mask",
    "ScoreMap",
    "Skipped",
    "by_rows",
    "look_up",
    "student_t",
    "unknown_rows",
]

MIN_BITS = 2
MAX_BITS = 8


@dataclass(frozen=True)
class Skipped:
    """A layer (or parameter) that is left alone, wholly or in part, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class HeatMaps:
    """How much each input value speaks for what was explained.

    Args:
        inputs: Samples [n, ...]; token ids [n, length] for a model that embeds them.
        relevance: Their relevance, same shape; positive speaks for, negative against.
    """

    inputs: Tensor
    relevance: Tensor

    def joined(self, other: HeatMaps | None) -> HeatMaps:
        """These and others of the same shape."""
        if other is None or other.relevance.shape[1:] != self.relevance.shape[1:]:
            return self
        return HeatMaps(torch.cat([self.inputs, other.inputs]), torch.cat([self.relevance, other.relevance]))


@dataclass(frozen=True)
class ScoreMap:
    """What a scoring pass found out about every weight. NaN means unknown, and unknown is never pruned.

    Args:
        score: Importance that ranks weights, >= 0, shape of the weight.
        relevance: Signed relevance R, mean over samples, shape of the weight.
        sensitivity: Mean over samples of (R / w)^2, >= 0, shape of the weight: what one unit of squared error costs.
        samples: Number of samples that were seen.
        rms: Root of the mean over samples of R^2 (summed over positions); empty where it was not collected, as are the
            next three.
        absolute: Mean |R| (summed over positions).
        positive: Mean of the positive part of R (summed over positions).
        standard_error: Standard error of `relevance` from the spread of batch sums.
        batches: Number of batches that were seen.
        left_out: Explained logits <= 0, which were left out.
        signed: Whether `relevance` has a meaningful sign; magnitude, for example, has none.
        skipped: Layers that were not scored, and why.
        heatmaps: Relevance of some inputs, where it was asked for.

    Raises:
        ValueError: The maps differ in names or shapes, or hold infinite values.
    """

    score: Mapping[str, Tensor]
    relevance: Mapping[str, Tensor]
    sensitivity: Mapping[str, Tensor]
    samples: int
    rms: Mapping[str, Tensor] = field(default_factory=dict)
    absolute: Mapping[str, Tensor] = field(default_factory=dict)
    positive: Mapping[str, Tensor] = field(default_factory=dict)
    standard_error: Mapping[str, Tensor] = field(default_factory=dict)
    batches: int = 0
    left_out: int = 0
    signed: bool = True
    skipped: tuple[Skipped, ...] = ()
    heatmaps: HeatMaps | None = None

    def __post_init__(self) -> None:
        for label in ("relevance", "sensitivity", "rms", "absolute", "positive", "standard_error"):
            tensors = getattr(self, label)
            if not tensors and label not in ("relevance", "sensitivity"):
                continue
            if tensors.keys() != self.score.keys():
                raise ValueError(f"score and {label} name different parameters: {sorted(self.score)} {sorted(tensors)}")
            for name, tensor in tensors.items():
                if tensor.shape != self.score[name].shape:
                    raise ValueError(f"{label} of {name} has shape {tuple(tensor.shape)}, its score another")
        for name, tensor in self.score.items():
            if _holds_infinity(tensor):
                raise ValueError(f"score of {name} holds infinite values")

    @property
    def unknown(self) -> list[str]:
        """Names of the parameters of which no weight has a score."""
        return [name for name, tensor in self.score.items() if bool(torch.isnan(tensor).all())]

    def nonpositive(self, confidence: float | None = None) -> dict[str, Tensor]:
        """Which weights have relevance <= 0; unknown ones have not.

        Args:
            confidence: One-sided, in [0.5, 1): only weights whose relevance is that surely <= 0, by Student's t with
                one degree of freedom less than batches. None: by the mean alone.

        Raises:
            ValueError: `confidence` out of range, no standard error was collected, or relevance has no sign.
        """
        if not self.signed:
            raise ValueError("these scores have no sign: use a criterion such as 'lrp'")
        if confidence is None:
            return {name: tensor <= 0 for name, tensor in self.relevance.items()}
        if not 0.5 <= confidence < 1:
            raise ValueError(f"confidence must lie in [0.5, 1), got {confidence}")
        if not self.standard_error:
            raise ValueError("confidence needs a standard error: score with statistics=('standard_error', ...)")
        quantile = student_t(confidence, self.batches - 1)
        return {name: tensor + quantile * self.standard_error[name] <= 0 for name, tensor in self.relevance.items()}


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
    """Bit width of every row: of every output channel, or of every group of input channels within one (`by_rows`).

    Args:
        bits: uint8 tensors of shape [rows], values in 2..8.
        channel_size: Number of weights in one row of each parameter.

    Raises:
        ValueError: A width outside 2..8, widths of another shape, or sizes of other parameters.
    """

    bits: Mapping[str, Tensor]
    channel_size: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.bits.keys() != self.channel_size.keys():
            differing = sorted(self.bits.keys() ^ self.channel_size.keys())
            raise ValueError(f"bit widths and sizes of rows name different parameters: {differing}")
        for name, tensor in self.bits.items():
            if tensor.dim() != 1:
                raise ValueError(f"bit widths of {name} must have shape [rows], got {tuple(tensor.shape)}")
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
        allocation: Bit width of each row; None while nothing is quantized.
        scales: Step of the grid of each row, float32 of shape [rows], exactly representable in bfloat16, >= 0. A
            weight equals its integer code times the scale, codes within +-(2^(bits-1) - 1).
        codebooks: For layers that share values: these, float32 of shape [blocks, 2^bits - 1], each row rising, zero in
            the middle and exactly representable in bfloat16. Each block of consecutive channels, as many as the
            others, has one. A code then is a place in it, counted from zero's, and scales are 1.
        skipped: What was left alone, and why.
        provenance: How it was made (criterion, versions and the like): plain text that every file keeps.
    """

    mask: Mask
    allocation: BitAllocation | None = None
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    codebooks: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        quantized = set(self.allocation.bits) if self.allocation else set()
        if quantized != set(self.scales):
            raise ValueError(f"scales and bit widths name different parameters: {sorted(quantized ^ set(self.scales))}")
        for name, scale in self.scales.items():
            if self.allocation is not None and scale.shape != self.allocation[name].shape:
                raise ValueError(
                    f"expected a scale for each of the {len(self.allocation[name])} rows of {name} that have a bit "
                    f"width, got scales of shape {tuple(scale.shape)}"
                )
        for name, codebook in self.codebooks.items():
            if name not in quantized:
                raise ValueError(f"{name} has a codebook, but no bit width")
            assert self.allocation is not None
            widths = self.allocation[name].unique().tolist()
            channels = len(self.allocation[name])
            fits = codebook.dim() == 2 and len(codebook) and not channels % len(codebook)
            if len(widths) != 1 or not fits or codebook.shape[1] != 2 ** widths[0] - 1:
                raise ValueError(
                    f"{name} has codebooks of shape {tuple(codebook.shape)}, {channels} channels and widths {widths}: "
                    "expected one width, 2^bits - 1 values, and a number of codebooks that divides the channels"
                )
            if bool(codebook[:, codebook.shape[1] // 2].any()) or bool((codebook.diff() < 0).any()):
                raise ValueError(f"the codebooks of {name} must rise, with zero in the middle")


def by_rows(weight: Tensor, rows: int) -> Tensor:
    """See a weight as the rows that have a bit width and a scale each.

    A row is a channel (index of the first dimension) or, where there are more rows than channels, a group of
    consecutive input channels (second dimension) within one.

    Args:
        weight: Shape [channels, inputs, ...].
        rows: `channels`, or `channels * groups` for a number of groups that divides the inputs.

    Returns:
        The weight itself, or shape [channels * groups, inputs / groups, ...]: a view where memory allows it, else a
        copy.

    Raises:
        ValueError: Another number of rows.
    """
    if rows == len(weight):
        return weight
    groups, left = divmod(rows, max(1, len(weight)))
    if weight.dim() < 2 or groups < 1 or left or weight.shape[1] % groups:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} cannot be cut into {rows} rows: expected one row a channel "
            f"({len(weight)}), or that times a number of groups that divides its input channels"
        )
    return weight.reshape(rows, weight.shape[1] // groups, *weight.shape[2:])


def look_up(codes: Tensor, codebook: Tensor) -> Tensor:
    """The values that codes stand for, in their shape.

    Args:
        codes: Places in a codebook, counted from zero's in the middle; shape [channels, ...].
        codebook: Shape [blocks, values], see `CompressionPlan`.
    """
    blocks, values = codebook.shape
    starts = torch.arange(blocks, device=codebook.device).unsqueeze(1) * values + values // 2
    places = codes.to(torch.int64).reshape(blocks, -1) + starts
    return codebook.flatten()[places].reshape(codes.shape)


def unknown_rows(scores: Mapping[str, Tensor]) -> list[Skipped]:
    """Name the weights of which some rows (first axis), or all, are NaN."""
    result = []
    for name, tensor in scores.items():
        rows = int(tensor.flatten(1).isnan().any(1).sum()) if tensor.dim() > 1 else int(tensor.isnan().sum())
        if rows:
            part = "" if rows == len(tensor) else f" for {rows} of {len(tensor)} rows"
            result.append(Skipped(name, f"relevance unknown{part} (not reached by an ordinary layer call)"))
    return result


def _holds_infinity(tensor: Tensor) -> bool:
    """In one pass, unless there is NaN."""
    if not tensor.numel():
        return False
    ends = torch.stack(tensor.aminmax())
    return bool(torch.isinf(tensor if ends.isnan().any() else ends).any())


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t: the expansion in 1 / degrees of Abramowitz & Stegun 26.7.5.

    Args:
        probability: In [0.5, 1).
        degrees: Of freedom, >= 7, where the error is below 0.01 up to a probability of 0.99.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum([term / float(degrees**power) for power, term in enumerate(terms, 1)])
