"""`compress`: what a fit with `XAICompression` does, in one call and without training."""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torchmetrics import Metric

from lightning_xai_compress.budget import check_target_size, target_bytes
from lightning_xai_compress.checks import check_names, check_number
from lightning_xai_compress.compression.goals import Judge, meet_drop, meet_numbers, meet_size
from lightning_xai_compress.compression.work import Work, relevance_shares
from lightning_xai_compress.criteria import Criterion, check_criterion, criterion_name
from lightning_xai_compress.formats import Files
from lightning_xai_compress.plan import CompressionPlan
from lightning_xai_compress.pruning import Choice
from lightning_xai_compress.quantization import check_bits
from lightning_xai_compress.relevance import unwrapped
from lightning_xai_compress.report import Measured, Mode, Report, build_report, dense_bytes

__all__ = ["Compressed", "compress"]

_LIBRARIES = ("lightning-xai-compress", "torch", "torchao", "torchmetrics", "safetensors", "constriction")


@dataclass(frozen=True)
class Compressed:
    """What became of a model.

    Args:
        plan: What was decided; `save(model, plan, folder, formats=...)` writes the files.
        report: Before and after, with bytes of the packed file ("safetensors").
    """

    plan: CompressionPlan
    report: Report


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target_size: float | int | None = None,
    max_drop: float | None = None,
    sparsity: float | None = None,
    average_bits: float | None = None,
    metric: Metric | None = None,
    mode: Mode | None = None,
    validation: Iterable[Any] | None = None,
    criterion: str | Criterion = "lrp",
    selection: Literal["least", "nonpositive"] = "least",
    bits: Sequence[int] = (2, 3, 4, 6, 8),
    exclude: Sequence[str] = (),
    choice: Choice | None = None,
    steps: int = 4,
    files: Files | None = None,
) -> Compressed:
    """Prune and quantize a trained model in place, by what its decisions rest on, without training it any further.

    Scores the weights, prunes, gives the rest the bit widths of least error, and estimates the statistics of BatchNorm
    layers anew. All else is left as it was found: gradients, `requires_grad`, training flags, hooks and random state;
    after an error, the weights, too. Where training is possible, `XAICompression` lets the weights that stay heal.

    Exactly one goal is given: `target_size`, or `max_drop`, or `sparsity` and `average_bits` (one of them or both).

    Args:
        model: Any module; of one that `torch.compile` wrapped, the original one is compressed, and is to be saved.
        batches: Some hundred samples or more as `score` takes them, on the model's device; gone through several times
            (an iterator is kept as a list).
        target_size: Share of the dense file in (0, 1), or bytes: sparsity and bits are chosen together, so that the
            packed file has as many, to within 2 % from below.
        max_drop: The smallest file that is found to lose no more than so many points of `metric` on `validation`:
            hundredths where the dense value lies in [-1, 1], else units of the metric. All states that were tried are
            in `report.path`.
        sparsity: Share of the compressible weights to be zero, in [0, 1).
        average_bits: Mean bit width over all compressible weights, pruned ones included.
        metric: A torchmetrics metric; measured before and after, wherever it is given.
        mode: Whether "max" or "min" of it is best; None: what the metric says of itself.
        validation: Batches to measure it on, as `batches`.
        criterion: What weights are scored by, see `score`; or a function `(model, batches, layers)`, such as one that
            calls `score` with other settings.
        selection: "least": smallest score first. "nonpositive": weights of relevance <= 0 before all others.
        bits: Widths to choose from, each in 2..8.
        exclude: Shell-style patterns of layers to leave alone.
        choice: Scope, floors, normalization and protected layers of pruning.
        steps: In how many rounds weights go, each with a scoring of those that are left. On test data of digits, at 4 %
            of the dense bytes, a CNN of 99 % accuracy keeps 44, 90 and 93 % with 1, 4 and 8 of them, an MLP of 96 %
            keeps 71, 90 and 90 %.
        files: `float16` and `merge_batchnorm` change the model itself here, so that its files are exact.

    Raises:
        ValueError: Goals that contradict each other or are missing, a setting out of range, a pattern that matches
            nothing, no batches, a metric without mode or validation or that gives no number.
        CompressionError: No compressible layer.
        RelevanceError: Batches that are not understood, or weights that cannot be scored.
        BudgetError: All that may be pruned is not enough for `target_size`.
    """
    _check_goal(target_size=target_size, max_drop=max_drop, sparsity=sparsity, average_bits=average_bits)
    check_criterion(criterion)
    if selection not in ("least", "nonpositive"):
        raise ValueError(f"selection must be 'least' or 'nonpositive', got {selection!r}")
    if check_number("steps", steps, whole=True) < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    widths = check_bits(bits, average_bits)
    judge = _judge(max_drop, metric, mode, validation)
    original = unwrapped(model)
    with _random_state_kept(original):
        work = Work(
            original,
            _repeatable("batches", batches),
            exclude=check_names("exclude", exclude),
            criterion=criterion,
            selection=selection,
            bits=widths,
            choice=choice or Choice(),
            steps=steps,
            files=files or Files(),
        )
        dense = Measured(dense_bytes(original), judge.measure(original) if judge else None)
        outcome = ""
        try:
            if target_size is not None:
                outcome = meet_size(work, target_bytes(check_target_size(target_size), dense.bytes))
            elif max_drop is not None and judge is not None and dense.accuracy is not None:
                outcome = meet_drop(work, max_drop, judge, dense.accuracy)
            else:
                meet_numbers(work, sparsity, average_bits)
            accuracy = judge.measure(original) if judge else None
        except BaseException:
            work.restore()
            raise
    assert work.plan is not None
    assert work.scores is not None
    report = build_report(
        original,
        work.plan,
        dense=dense,
        accuracy=accuracy,
        metric=f"{type(metric).__name__} (validation data)" if metric is not None else "",
        criterion=criterion_name(criterion),
        relevance=relevance_shares(work.scores),
        positive_pruned=work.positives,
        versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
        budget=outcome,
        path=work.path,
    )
    return Compressed(work.plan, report)


def _check_goal(**goals: float | None) -> None:
    """One goal, and no contradiction.

    Raises:
        ValueError: Says what was given, and what to do.
    """
    given = [f"{name}={value}" for name, value in goals.items() if value is not None]
    free = goals["target_size"] is None and goals["max_drop"] is None
    if not given or (len(given) > 1 and not free):
        raise ValueError(
            "give one goal: target_size (a file size), max_drop (points of a metric), or sparsity and average_bits "
            f"(either or both); the first two choose sparsity and bits themselves. Got {', '.join(given) or 'none'}"
        )
    if goals["target_size"] is not None:
        check_target_size(goals["target_size"])
    if goals["max_drop"] is not None and check_number("max_drop", goals["max_drop"]) <= 0:
        raise ValueError(f"max_drop must be positive (points that the metric may lose), got {goals['max_drop']}")
    if goals["sparsity"] is not None and not 0 <= check_number("sparsity", goals["sparsity"]) < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {goals['sparsity']}")


def _judge(
    max_drop: float | None, metric: Metric | None, mode: Mode | None, validation: Iterable[Any] | None
) -> Judge | None:
    """What measures the metric, where there is one; refuses an accuracy to keep without one to measure."""
    if metric is None:
        if mode is not None or validation is not None:
            raise ValueError("mode and validation are of a metric: give metric=, too, or leave them out")
        if max_drop is not None:
            raise ValueError(
                f"max_drop={max_drop} needs metric= (what may drop) and validation= (batches to measure it on)"
            )
        return None
    judge = Judge(metric, mode, None if validation is None else _repeatable("validation", validation))
    if max_drop is not None and judge.mode is None:
        raise ValueError(
            f"max_drop={max_drop} needs mode='max' or 'min': {type(metric).__name__} does not tell which is better"
        )
    return judge


def _repeatable(name: str, batches: Iterable[Any]) -> Iterable[Any]:
    """What can be gone through several times; an iterator is used up here."""
    if not isinstance(batches, Iterable):
        raise ValueError(f"{name} must be batches (a DataLoader, a list, an iterator), got {batches!r}")
    return list(batches) if isinstance(batches, Iterator) else batches


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Loaders shuffle and transform by the global generators: put them all back."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
