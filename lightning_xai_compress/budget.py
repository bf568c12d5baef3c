"""A size instead of knobs: sparsity and bit widths, chosen together, that fill a number of bytes.

What counts are bytes of the packed file, entropy coding included: every candidate is compressed on paper (masked, put
onto its grids, packed) and weighed, and the model is left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_xai_compress.checks import check_number
from lightning_xai_compress.errors import BudgetError
from lightning_xai_compress.formats import Files, finished, packed_size
from lightning_xai_compress.plan import CompressionPlan, Mask, Skipped
from lightning_xai_compress.quantization import Allocated, Strategy, WidthCosts, quantize
from lightning_xai_compress.report import Mode, estimated_bytes
from lightning_xai_compress.structure import Kept, shrunk_plan

__all__ = [
    "CLOSE",
    "HIGHEST",
    "VALUE_BITS",
    "Candidate",
    "Drafts",
    "Measure",
    "Select",
    "check_least",
    "check_target_size",
    "expected_sparsity",
    "points_lost",
    "replaced",
    "target_bytes",
    "weigh",
]

HIGHEST = 1 - 1e-6  # sparsity; floors of layers keep what must be kept
CLOSE = 0.002  # of the target: near enough for a search to end
VALUE_BITS = 2.5  # of a kept weight, where the user leaves it open
_GRAIN = 16  # bytes
_TRIALS = 16
_REFINEMENTS = 6
_STEP = 1.25  # in density, until a search has both sides

Select = Callable[[float], Mask]
Measure = Callable[[Mapping[str, Tensor]], WidthCosts]
Smaller = Callable[[], AbstractContextManager[Kept | None]]


@dataclass(frozen=True)
class Candidate:
    """One way to compress a model, and what its packed file would weigh.

    Args:
        mask: Which weights stay.
        allocated: Widths and scales.
        bytes: Of the packed file.
    """

    mask: Mask
    allocated: Allocated
    bytes: int


@dataclass(frozen=True)
class Drafts:
    """Compresses a model on paper.

    Args:
        model: Changed while a candidate is weighed, and as it was afterwards.
        weights: Float values of the compressible parameters by name: latents, where there are any.
        select: From a sparsity to a mask; a higher sparsity prunes more.
        measure: From masked weights to what every width costs, in entropy-coded bits.
        strategy: How widths are chosen, see `WidthCosts.choose`.
        files: How files will be written: whether the rest is rounded to float16, and BatchNorm merged.
        skipped, provenance: Are in the file, too.
        smaller: Makes the model as small as the file holds it.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    select: Select
    measure: Measure
    strategy: Strategy = "knapsack"
    files: Files = field(default_factory=Files)
    skipped: tuple[Skipped, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    smaller: Smaller = nullcontext

    def pruned(self, limit: float, value_bits: float, *, low: float = 0.0, close: float = CLOSE) -> Candidate:
        """As little pruning as fits a number of bytes.

        Args:
            limit: Bytes.
            value_bits: Coded bits that the value of a kept weight may take on average, beyond those that say where
                it is.
            low: Sparsity at least.
            close: Share of the limit that may be left.

        Returns:
            That of sparsity `low` where it fits, that of the most pruning where nothing does.
        """
        guess = 0.97 * (1 - low) if low else self._density(limit, value_bits)
        return _closest(
            lambda density: self._at(1 - density, value_bits), 1 - HIGHEST, 1 - low, limit, guess=guess, close=close
        )

    def smallest(self) -> Candidate:
        """All is pruned that may be, the rest has the narrowest widths."""
        return self._at(HIGHEST, 0.0)

    def filled(self, limit: float, sparsity: float) -> Candidate:
        """The widths of least error at a sparsity that fit a number of bytes; where none fit, the narrowest.

        Args:
            limit: Bytes.
            sparsity: Share of zeros.
        """
        mask, masked = self._masked(sparsity)
        costs = self.measure(masked)
        best = self._weighed(mask, masked, choose(costs, 0.0, self.strategy))
        payload = limit - (best.bytes - best.allocated.bytes)  # what is no payload hardly changes with the widths
        for _ in range(_REFINEMENTS):
            if _is_close(best.bytes, limit):
                break
            found = self._weighed(mask, masked, choose(costs, payload, self.strategy))
            if found.bytes == best.bytes < limit:
                break  # all are at the widest
            if best.bytes < found.bytes <= limit:
                best = found
            payload += limit * (1 - CLOSE / 2) - found.bytes
        return best

    def trimmed(self, limit: float, plan: CompressionPlan) -> Candidate:
        """As little pruning as fits a number of bytes, with the widths and scales that the model has.

        Args:
            limit: Bytes.
            plan: Of the quantized model.
        """
        assert plan.allocation is not None
        held = Allocated(plan.allocation, plan.scales, 0.0, 0.0, 0.0, plan.codebooks)
        low = 1 - plan.mask.sparsity
        return _closest(
            lambda density: self._weighed(*self._masked(1 - density), held), 1 - HIGHEST, low, limit, guess=0.99 * low
        )

    def _density(self, limit: float, value_bits: float) -> float:
        """About which share of the weights a number of bytes holds, if nothing else took any."""
        bits = 8 * limit / sum(weight.numel() for weight in self.weights.values())
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if _entropy(middle) + middle * value_bits < bits else (low, middle)
        return high

    def _at(self, sparsity: float, value_bits: float) -> Candidate:
        mask, masked = self._masked(sparsity)
        kept = sum(int(keep.sum()) for keep in mask.keep.values())
        total = sum(keep.numel() for keep in mask.keep.values())
        places = total * _entropy(kept / total)
        costs = self.measure(masked)
        return self._weighed(mask, masked, choose(costs, (places + kept * value_bits) / 8, self.strategy))

    @torch.no_grad()
    def _masked(self, sparsity: float) -> tuple[Mask, dict[str, Tensor]]:
        mask = self.select(sparsity)
        return mask, {
            name: weight.masked_fill(~mask[name].to(weight.device), 0.0) for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def _weighed(self, mask: Mask, masked: Mapping[str, Tensor], found: Allocated) -> Candidate:
        allocation, scales, codebooks = found.allocation, found.scales, found.codebooks
        values = {
            name: quantize(each, allocation[name], scales[name], codebooks.get(name)) for name, each in masked.items()
        }
        plan = CompressionPlan(mask, allocation, scales, self.skipped, self.provenance, codebooks)
        with replaced(self.model, values):
            return Candidate(mask, found, weigh(self.model, plan, self.files, self.smaller))


def choose(costs: WidthCosts, max_bytes: float, strategy: Strategy = "knapsack") -> Allocated:
    """Widths within a number of bytes, or the narrowest that may be."""
    least = float(torch.where(costs.cost.isfinite(), costs.price, torch.inf).amin(1).sum()) / 8
    return costs.choose(max_bytes=max(max_bytes, least), strategy=strategy)


def _entropy(share: float) -> float:
    """Bits that say for one weight whether it is kept."""
    return 0.0 if share in (0.0, 1.0) else -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def check_target_size(target_size: float | int) -> float | int:
    """A share of the dense bytes in (0, 1), or a number of bytes.

    Raises:
        ValueError: Neither.
    """
    value: float | int = check_number("target_size", target_size)
    if value > 1 and value == int(value):  # a config's whole numbers may come as floats
        value = int(value)
    if (isinstance(value, int) and value >= 1) or 0 < value < 1:
        return value
    raise ValueError(
        "target_size must be a share of the dense file between 0 and 1, such as 0.02, or a whole number of bytes, got "
        f"{target_size!r}"
    )


def target_bytes(target_size: float | int, dense: int) -> int:
    """The target in bytes.

    Args:
        target_size: See `check_target_size`.
        dense: Bytes of the dense file.

    Raises:
        ValueError: The target is no smaller than the dense file.
    """
    target = target_size if isinstance(target_size, int) else int(target_size * dense)
    if target >= dense:
        raise ValueError(
            f"target_size={target_size} bytes is no smaller than the dense file, which has {dense:,}: name fewer"
        )
    return target


def check_least(least: int, target: int, files: Files) -> None:
    """Refuse a target that cannot be met whatever is pruned.

    Args:
        least: Bytes with as much pruned as may be, at the narrowest widths.
        target: Bytes wanted.
        files: How they are written; names what could still make them smaller.

    Raises:
        BudgetError: It is too small.
    """
    if least > target:
        halve = "" if files.float16 else ", or halve what is not quantized with files=Files(float16=True)"
        merge = "" if files.merge_batchnorm else ", or halve BatchNorm with files=Files(merge_batchnorm=True)"
        raise BudgetError(
            f"target_size cannot be met: {target:,} bytes are wanted, but with all pruned that may be pruned the file "
            f"still has {least:,} (biases, BatchNorm, layers left alone or protected, scales, names). Raise "
            f"target_size, exclude or protect less{halve}{merge}"
        )


def points_lost(before: float, after: float, mode: Mode) -> float:
    """What a metric has lost, in points: hundredths where its value before lies in [-1, 1], else its own units.

    Args:
        before, after: Its values.
        mode: Whether "max" or "min" of it is best.

    Returns:
        Negative where it has become better.
    """
    lost = before - after if mode == "max" else after - before
    return lost * 100 if abs(before) <= 1 else lost


def expected_sparsity(target: int, dense: int, weights: int, bits: float) -> float:
    """About which sparsity a size stands for, before any training; see `estimated_bytes`.

    Args:
        target, dense: Bytes.
        weights: Number of compressible weights.
        bits: Mean width.

    Returns:
        In [0, 1).
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if estimated_bytes(dense, weights, middle, bits) > target else (low, middle)
    return min(high, HIGHEST)


@torch.no_grad()
def weigh(model: nn.Module, plan: CompressionPlan, files: Files, smaller: Smaller = nullcontext) -> int:
    """Bytes of the packed file of a model that holds the compressed values.

    Args:
        model: As it was afterwards.
        plan: What was decided.
        files: How it is written.
        smaller: Makes the model as small as the file holds it.
    """
    with smaller() as kept, finished(model, files, set(plan.mask.keep)) as left:
        plan = shrunk_plan(plan, kept) if kept else plan
        named = tuple(entry for entry in left if entry not in plan.skipped)  # is in the file, too
        return packed_size(model, replace(plan, skipped=(*plan.skipped, *named))).total


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, parameters hold other values; whatever happens to any tensor of the model is undone."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        for name, value in values.items():
            tensors[name].data.copy_(value)
        yield
    finally:
        for name, value in own.items():
            tensors[name].data.copy_(value)


def _is_close(size: int, limit: float, close: float = CLOSE) -> bool:
    """Whether hardly more fits: files grow by some bytes at a time."""
    return limit - max(close * limit, _GRAIN) <= size <= limit


def _closest(
    make: Callable[[float], Candidate], low: float, high: float, limit: float, *, guess: float, close: float = CLOSE
) -> Candidate:
    """The candidate of the largest argument that fits, to within a share of the limit; bytes rise with the argument.

    Both sides are found by steps from a guess, then false position, with the weight of an end that stays halved (the
    Illinois variant), since a straight line through both ends nearly fits.
    """
    aim = limit * (1 - close / 2)
    middle = min(max(guess, low), high)
    lower = upper = None  # arguments, candidates, and how far they are from the aim
    side, step = 0, _STEP
    for _ in range(_TRIALS):
        found = make(middle)
        if found.bytes <= limit:
            if _is_close(found.bytes, limit, close) or middle >= high:
                return found
            lower = middle, found, found.bytes - aim
            if upper is not None and side < 0:
                upper = (*upper[:2], upper[2] / 2)
            side = -1
        else:
            if middle <= low:
                return found
            upper = middle, found, found.bytes - aim
            if lower is not None and side > 0:
                lower = (*lower[:2], lower[2] / 2)
            side = 1
        if lower is None:
            middle, step = max(middle / step, low), step**1.5  # where the guess is far off, it takes few steps, too
        elif upper is None:
            middle, step = min(middle * step, high), step**1.5
        else:
            middle = upper[0] - upper[2] * (upper[0] - lower[0]) / (upper[2] - lower[2])
    return lower[1] if lower is not None else make(low)
