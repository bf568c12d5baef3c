"""What a user asks for, a size, an accuracy or numbers, and how the work is led there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn
from torchmetrics import Metric

from lightning_xai_compress.budget import check_least, points_lost, replaced
from lightning_xai_compress.compression.work import Work
from lightning_xai_compress.plan import ScoreMap
from lightning_xai_compress.pruning import prunable
from lightning_xai_compress.quantization import measure_widths
from lightning_xai_compress.report import Mode, PathPoint, check_mode, evaluate

__all__ = ["Judge", "meet_drop", "meet_numbers", "meet_size"]

_CORRECTIONS = 4  # rounds in which a file that came out too large is made anew
_ALLOWED = 0.02  # of the target: what a file may be smaller
_FINEST = 1.02  # ratio of sizes at which the search for the smallest within max_drop ends


class Judge:
    """Measures the metric, and leaves buffers that a forward pass writes to as they were.

    Args:
        metric: Gives one number.
        mode: Whether "max" or "min" of it is best; None: what the metric says of itself.
        batches: To measure it on.

    Raises:
        ValueError: No metric, or nothing to measure it on.
    """

    def __init__(self, metric: Metric, mode: Mode | None, batches: Iterable[Any] | None) -> None:
        if not isinstance(metric, Metric):
            raise ValueError(
                "metric must be a torchmetrics metric that gives one number (an object, such as "
                f"MulticlassAccuracy(10); names of logged metrics need a fit), got {metric!r}"
            )
        if batches is None:
            raise ValueError("metric= is measured on validation batches: give validation=, too")
        self.metric, self.batches = metric, batches
        self.mode = check_mode(mode, metric)

    def measure(self, model: nn.Module) -> float:
        """The metric of a model now."""
        with replaced(model, {}):
            return evaluate(model, self.batches, self.metric)


def meet_size(work: Work, target: int) -> str:
    """Compress to a number of bytes.

    Returns:
        What came of it.

    Raises:
        BudgetError: All that may be pruned is not enough.
    """
    limit, size = float(target), 0
    for _ in range(_CORRECTIONS):
        size = work.shrink(limit)
        if size <= target:
            break
        if limit == target:
            check_least(work.least(), target, work.files)
        limit -= size - target  # statistics of BatchNorm may take more room than those that they replace
    check_least(size, target, work.files)
    outcome = f"target_size: {size:,} of {target:,} bytes ({size / target - 1:+.2%})"
    if size < target * (1 - _ALLOWED):
        outcome += f": nothing is left to fill with bits={work.bits}"
        warnings.warn(f"{outcome}. Offer wider bits, or ask for a smaller file", stacklevel=3)
    return outcome


def meet_drop(work: Work, max_drop: float, judge: Judge, reference: float) -> str:
    """Compress as far as a metric allows, by bisection over sizes; every state that is tried goes into `work.path`.

    Args:
        work: On a model as it came.
        max_drop: Points that the metric may lose.
        judge: Measures it.
        reference: Its value for the dense model.

    Returns:
        What came of it.

    Raises:
        ValueError: The reference is no number.
    """
    assert judge.mode is not None
    if not math.isfinite(reference):
        raise ValueError(
            f"max_drop={max_drop} needs a metric that is a number, but {type(judge.metric).__name__} is {reference} "
            "for the dense model: give more validation data, or another metric"
        )

    def lost(limit: float) -> float:
        size = work.shrink(limit)
        value = judge.measure(work.model)
        assert work.plan is not None
        bits = work.plan.allocation.average_bits if work.plan.allocation else None
        work.path.append(PathPoint(0.0, size, value, work.plan.mask.sparsity, bits))
        return points_lost(reference, value, judge.mode or "max")

    low, high = float(work.least()), float(work.most())
    points = lost(high)
    kept = work.state()
    if not points <= max_drop:
        outcome = (
            f"max_drop={max_drop:g} is missed by {points - max_drop:.2f} points: with nothing pruned and the widest of "
            f"bits={work.bits} the model loses {points:.2f} at {work.path[-1].bytes:,} bytes. Offer wider bits, allow "
            "a larger drop, give more validation data, or train while compressing, with XAICompression"
        )
        warnings.warn(outcome, stacklevel=3)
        return outcome
    size = work.path[-1].bytes
    while high > low * _FINEST:
        limit = math.sqrt(low * high)
        found = lost(limit)
        if found <= max_drop:
            high, points, kept, size = limit, found, work.state(), work.path[-1].bytes
        else:
            low = limit
    work.load(kept)
    return f"max_drop: {points:+.2f} of {max_drop:g} points lost, {size:,} bytes"


def meet_numbers(work: Work, sparsity: float | None, average_bits: float | None) -> None:
    """Compress to a sparsity and a mean width, or to one of them.

    Raises:
        ValueError: What must stay leaves no room for the sparsity, or unknown relevance none for the mean width.
    """
    wanted = 0.0 if sparsity is None else sparsity
    _check_room(work, work.dense_scores(), wanted)
    scores, previous = work.rounds(wanted, steps=work.steps if wanted else 1)
    mask = work.prune(scores, wanted, previous)
    allocated = None
    if average_bits is not None:
        allocated = measure_widths(work.masked(mask), scores, bits=work.bits).choose(average_bits)
    work.settle(mask, allocated)


def _check_room(work: Work, scores: ScoreMap, sparsity: float) -> None:
    total = sum(each.numel() for each in scores.score.values())
    room = prunable(scores, work.choice)
    if min(round(sparsity * total), total - 1) > room:
        raise ValueError(
            f"sparsity={sparsity} cannot be met: only {room:,} of the {total:,} compressible weights "
            f"({room / total:.2%}) can go, since protected layers, floors (floor={work.choice.floor}, but at least a "
            "weight a layer and one an output) and unknown relevance keep the others. Lower sparsity or floor, or "
            "protect fewer layers"
        )
