"""Figures about a model: bytes of real files, and a metric on data."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import zstandard
from safetensors.torch import save
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_xai_compress.relevance import call_model, evaluation, split_batch

__all__ = [
    "DenseSizes",
    "Mode",
    "check_mode",
    "dense_bytes",
    "dense_sizes",
    "estimated_bytes",
    "evaluate",
    "zstd_bytes",
]

Mode = Literal["max", "min"]

_ZSTD_LEVELS = ((64 << 20, 19), (math.inf, 9))  # up to so many bytes: level


@dataclass(frozen=True)
class DenseSizes:
    """Bytes of the dense model as safetensors files, plain and under zstd (see `zstd_bytes`).

    Args:
        fp32, fp32_zstd: Floats in fp32.
        int8, int8_zstd: Compressible weights as int8 with one fp32 scale an output channel, the rest in fp32.
    """

    fp32: int
    fp32_zstd: int
    int8: int
    int8_zstd: int


def zstd_bytes(data: bytes) -> int:
    """Size under zstd: level 19 up to 64 MiB, level 9 beyond, where 19 would take minutes."""
    level = next(level for limit, level in _ZSTD_LEVELS if len(data) <= limit)
    return len(zstandard.ZstdCompressor(level=level).compress(data))


def dense_bytes(model: nn.Module) -> int:
    """Bytes of the model as a plain safetensors file: floats in fp32, tied tensors once, all that a state dict has."""
    return len(save(_dense_tensors(model)))


def dense_sizes(model: nn.Module, weights: Collection[str]) -> DenseSizes:
    """Bytes of a dense model, as it is and in int8.

    Args:
        model: Not compressed yet.
        weights: Names of the compressible weights.
    """
    tensors = _dense_tensors(model)
    plain = save(tensors)
    for name in [name for name in weights if name in tensors]:
        rows = tensors[name].flatten(1)
        scale = rows.abs().amax(1) / 127
        codes = (rows / torch.where(scale > 0, scale, 1.0)[:, None]).round()
        tensors[name], tensors[f"{name}.scale"] = codes.to(torch.int8).view_as(tensors[name]).contiguous(), scale
    small = save(tensors)
    return DenseSizes(len(plain), zstd_bytes(plain), len(small), zstd_bytes(small))


def _dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        key = (value.data_ptr(), value.shape)
        if value.numel() and key in seen:
            continue
        seen.add(key)
        value = value.detach().cpu()
        tensors[name] = (value.float() if value.is_floating_point() else value).clone().contiguous()
    return tensors


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Any], metric: Metric) -> float:
    """A torchmetrics metric over batches, the model in evaluation mode.

    Args:
        model: Called as `model(input)`.
        batches: On the model's device; see `relevance.split_batch`.
        metric: Takes `update(logits, target)` and computes one number; reset before and after.

    Raises:
        RelevanceError: A batch whose input and target are not found.
        ValueError: No batches, or a metric that gives no single number.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    home = metric.device
    metric = metric.to(device)
    metric.reset()
    count = 0
    with evaluation(model):
        for batch in batches:
            args, kwargs, target = split_batch(batch)
            metric.update(call_model(model, args, kwargs), target)
            count += 1
    if not count:
        raise ValueError("metric: there is no validation data to measure on")
    value = metric.compute()
    metric.reset()
    metric.to(home)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"metric {type(metric).__name__} must compute one number, got {value}")
    return float(value)


def check_mode(mode: str | None, metric: Metric | str | None) -> Mode | None:
    """What is best, as the user says or else the metric itself; None where neither does.

    Raises:
        ValueError: Another mode.
    """
    if mode not in (None, "max", "min"):
        raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
    higher = getattr(metric, "higher_is_better", None)
    return mode or (None if higher is None else "max" if higher else "min")  # type: ignore[return-value]


def estimated_bytes(dense: int, weights: int, sparsity: float, bits: float | None) -> int:
    """About how many bytes the packed file will have, before any training.

    Counts what an entropy coder needs where pruned weights are spread at random (a zero-or-not entropy a weight) and
    a kept weight costs about 0.85 of its width beyond that; dense otherwise.

    Args:
        dense: Bytes of the dense file.
        weights: Number of compressible weights.
        sparsity: Share of them that is zero.
        bits: Mean width; None where they are not quantized.
    """
    occupancy = 0.0 if sparsity in (0.0, 1.0) else -_xlogx(sparsity) - _xlogx(1 - sparsity)
    kept = 32.0 if bits is None else 0.85 * bits
    return round(dense - 4 * weights + weights * (occupancy + (1 - sparsity) * kept) / 8)


def _xlogx(value: float) -> float:
    return value * math.log2(value)
