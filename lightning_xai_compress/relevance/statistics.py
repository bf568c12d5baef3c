"""Sums of per-weight relevance over samples: constant memory over batches, additive over batches and ranks.

The relevance of one weight in one sample and at one position is r = w x c. Its sum over samples is the weight gradient
times w. The others are one more weight gradient each, without per-sample gradients: sum |r| = |w| wgrad(|x|, |c|), sum
r^2 = w^2 wgrad(x^2, c^2), and sum max(r, 0) = (sum |r| + sum r) / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lightning_xai_compress.errors import NonFiniteError, RelevanceError
from lightning_xai_compress.plan import HeatMaps, ScoreMap, Skipped, unknown_rows

__all__ = ["LEAST_BATCHES", "STATISTICS", "Processes", "RelevanceSums", "Statistic", "check_statistics"]

Statistic = Literal["rms", "absolute", "positive", "standard_error"]
STATISTICS: tuple[str, ...] = get_args(Statistic)
LEAST_BATCHES = 8  # fewer batch sums say too little about their spread


def check_statistics(statistics: Iterable[str]) -> tuple[Statistic, ...]:
    """Validate a choice of statistics.

    Raises:
        ValueError: A bare string, or no such statistic.
    """
    chosen = () if isinstance(statistics, str) else tuple(dict.fromkeys(statistics))
    known = tuple(each for each in get_args(Statistic) if each in chosen)
    if isinstance(statistics, str) or len(known) < len(chosen):
        raise ValueError(f"statistics must be a list of some of {', '.join(STATISTICS)}, got {statistics!r}")
    return known


class Processes(Protocol):
    """Processes that each see other batches of the same model; all must call alike."""

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes; the tensor may be used up."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """A `CompressionError` that is raised inside on one process is raised on all."""
        ...


class RelevanceSums:
    """What a pass adds up, per parameter name.

    Args:
        weights: Detached weights by parameter name.
        statistics: Which of `STATISTICS` to collect beside the signed mean.
        by_sample: Whether squares are of the sum over the positions of a sample (the empirical Fisher information) in
            place of each position.

    Attributes:
        samples: Samples that were explained.
        batches: Batches seen.
        left_out: Explained logits <= 0 that were left out.
        seen: Rows (first axis) of each weight that relevance reached.
    """

    def __init__(self, weights: Mapping[str, Tensor], statistics: Iterable[str] = ("rms",), *, by_sample: bool = False):
        self.weights = dict(weights)
        self.statistics = check_statistics(statistics)
        self.by_sample = by_sample
        self.samples = 0
        self.batches = 0
        self.left_out = 0
        self.used_up = False
        self.folded: dict[str, Tensor] = {}
        self.seen = {name: weight.new_zeros(len(weight), dtype=torch.bool) for name, weight in self.weights.items()}
        kinds = ["signed"]
        kinds += ["square"] if "rms" in self.statistics else []
        kinds += ["absolute"] if "absolute" in self.statistics or "positive" in self.statistics else []
        kinds += ["between"] if "standard_error" in self.statistics else []
        self.sums = {kind: _Totals(self.weights) for kind in kinds}
        self._direct = _Totals(self.weights)

    def collects(self, kind: str) -> bool:
        """Whether "square" or "absolute" has to be handed in."""
        return kind in self.sums

    def add(self, kind: str, name: str, rows: slice, value: Tensor) -> None:
        """Add one call's sum of |x c| ("absolute") or (x c)^2 ("square") for some rows of a weight."""
        self.sums[kind].add(name, rows, value)

    def add_relevance(self, name: str, rows: slice, value: Tensor) -> None:
        """Add one call's sum of r / w, where autograd does not give it."""
        self._direct.add(name, rows, value)

    def end_batch(self, gradients: Mapping[str, Tensor | None], samples: int, left_out: int) -> None:
        """Add the signed sums of a batch: weight gradients, which are taken over, and what was handed in directly."""
        for name, gradient in gradients.items():
            direct = self._direct.pop(name, None)
            total = gradient if direct is None else direct if gradient is None else direct.add_(gradient)
            if total is None:
                continue
            if "between" in self.sums and samples:
                self.sums["between"][name].addcmul_(total, total, value=1 / samples)
            self.sums["signed"].add(name, slice(None), total.contiguous())
        self.samples += samples
        self.left_out += left_out
        self.batches += 1

    def take(self, name: str, gradient: Tensor) -> None:
        """Add the signed sum of r / w over batches that `end_batch` has counted; the tensor is taken over."""
        self.sums["signed"].add(name, slice(None), gradient)

    def merge(self, other: RelevanceSums) -> None:
        """Add the sums of other batches of the same model."""
        self.samples += other.samples
        self.batches += other.batches
        self.left_out += other.left_out
        for name in self.weights:
            for kind, totals in self.sums.items():
                totals[name].add_(other.sums[kind][name])
            self.seen[name] |= other.seen[name]
        self.folded = other.folded | self.folded

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add up over processes that each saw other batches, or none.

        Args:
            total: Gives the sum of a tensor over all processes, such as
                `functools.partial(strategy.reduce, reduce_op="sum")`; all processes must call it alike.
        """
        device = next(iter(self.weights.values())).device
        counts = torch.tensor([self.samples, self.batches, self.left_out], device=device)
        self.samples, self.batches, self.left_out = total(counts).tolist()
        folds = total(torch.tensor([float(name in self.folded) for name in self.weights], device=device)).tolist()
        for (name, weight), folded in zip(self.weights.items(), folds, strict=True):  # in one order on all processes
            for totals in self.sums.values():
                totals[name] = total(totals[name].contiguous())
            self.seen[name] = total(self.seen[name].to(torch.float32)) > 0
            if folded:  # the same factors wherever a batch came by
                own = self.folded[name].expand_as(weight) if name in self.folded else torch.zeros_like(weight)
                self.folded[name] = total(own.contiguous().clone()).div_(folded)

    def score_map(self, skipped: tuple[Skipped, ...] = (), heatmaps: HeatMaps | None = None) -> ScoreMap:
        """Means over samples, and the score that ranks.

        The sums are used up: for large layers, fresh memory would cost more than the arithmetic.

        Args:
            skipped: Layers that were not scored.
            heatmaps: To go with it.

        Raises:
            RelevanceError: Nothing was explained or reached, or too few batches for a standard error.
            NonFiniteError: A sum is not finite; names the parameter.
        """
        self._check()
        self.used_up = True
        relevance, sensitivity, scores = {}, {}, {}
        extra: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.statistics}
        for name, weight in self.weights.items():
            total = {kind: totals.take(name) for kind, totals in self.sums.items()}
            found: dict[str, Tensor] = {}
            magnitude = weight.abs()
            if "between" in total:
                found["standard_error"] = self._standard_error(total, magnitude)
            if "square" in total:
                spread = total["square"].div_(self.samples)
            else:  # the next best that was collected
                spread = total.get("absolute", total["signed"]).square().div_(self.samples**2)
            relevance[name] = total["signed"].mul_(weight).div_(self.samples)
            if "absolute" in total:
                found["absolute"] = total["absolute"].mul_(magnitude).div_(self.samples)
                if "positive" in self.statistics:
                    found["positive"] = (found["absolute"] + relevance[name]).div_(2)
            rms = spread.sqrt().mul_(magnitude)
            if "square" in total:
                found["rms"] = rms
            sensitivity[name] = spread
            scores[name] = rms * magnitude if "square" in total else rms.mul_(magnitude)
            del total, magnitude
            if name in self.folded:
                scores[name].mul_(self.folded[name])
            for label, tensor in (("relevance", relevance[name]), ("score", scores[name])):
                if tensor.numel() and not all(torch.isfinite(end) for end in tensor.aminmax()):
                    raise NonFiniteError(f"{label} of {name} is not finite after {self.batches} batches")
            if not self.seen[name].all():
                unknown = ~self.seen[name].view(-1, *[1] * (weight.dim() - 1))
                for tensor in (relevance[name], spread, scores[name], *found.values()):
                    tensor.masked_fill_(unknown, torch.nan)
            for kind in self.statistics:
                extra[kind][name] = found[kind]
        partly = {name: scores[name] for name, rows in self.seen.items() if not rows.all()}
        return ScoreMap(
            scores,
            relevance,
            sensitivity,
            self.samples,
            rms=extra.get("rms", {}),
            absolute=extra.get("absolute", {}),
            positive=extra.get("positive", {}),
            standard_error=extra.get("standard_error", {}),
            batches=self.batches,
            left_out=self.left_out,
            skipped=(*skipped, *unknown_rows(partly)),
            heatmaps=heatmaps,
        )

    def _check(self) -> None:
        if self.used_up:
            raise RuntimeError("these sums have been made into scores already")
        if not self.samples:
            if self.left_out:
                raise RelevanceError(
                    f"all {self.left_out} explained logits are <= 0, where relevance has no meaning: train the model "
                    "first, or use explain='margin'"
                )
            raise RelevanceError("there was no sample to score: expected at least one batch with samples")
        if not any(rows.any() for rows in self.seen.values()):
            raise RelevanceError(
                "the explained tensor depends on none of the layers to score: expected it to be computed from "
                f"{', '.join(list(self.weights)[:4])}"
            )
        if "between" in self.sums and self.batches < LEAST_BATCHES:
            raise RelevanceError(
                f"a standard error needs at least {LEAST_BATCHES} batches, got {self.batches}: use smaller batches"
            )

    def _standard_error(self, total: Mapping[str, Tensor], magnitude: Tensor) -> Tensor:
        """A batch mean of n samples spreads by 1 / n of what samples do."""
        mean = total["signed"] / self.samples
        variance = (total["between"] / self.samples).addcmul_(mean, mean, value=-1).clamp_(min=0)
        return variance.div_(self.batches - 1).sqrt_().mul_(magnitude)


class _Totals(dict[str, Tensor]):
    """One total a weight; zeros until something is added."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._weights = weights

    def __missing__(self, name: str) -> Tensor:
        self[name] = torch.zeros_like(self._weights[name])
        return self[name]

    def take(self, name: str) -> Tensor:
        """The total of a weight, which is zeros again afterwards."""
        return self.pop(name) if name in self else torch.zeros_like(self._weights[name])

    def add(self, name: str, rows: slice, value: Tensor) -> None:
        """Add to some rows; the first value for all rows is taken over as it is."""
        if name in self or rows != slice(None):
            self[name][rows].add_(value)
        else:
            self[name] = value
