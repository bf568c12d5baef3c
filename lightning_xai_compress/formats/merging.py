"""BatchNorm as one scale and one shift a channel, in the model: two of its four vectors then cost nothing in a file.

In evaluation y = (x - mean) / sqrt(var + eps) * weight + bias, which mean = 0 and var = 1 give as well with

    weight' = weight * sqrt((1 + eps) / (var + eps)),   bias' = bias - weight * mean / sqrt(var + eps).

The variance is 1, not 1 - eps: every dtype holds it (float16, too), and it is positive for any eps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_xai_compress.formats.layout import HALF_DTYPES, has_memory, sharing
from lightning_xai_compress.plan import Skipped

__all__ = ["merge_batchnorm", "merged_names"]

_VECTORS = ("weight", "bias", "running_mean", "running_var")
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)  # those that compute the formula above, and nothing else
_CLOSE = 1e-5  # of |weight| + |bias|, the usual size of a channel's outputs: what rounding may move them


def merge_batchnorm(model: nn.Module, names_to_leave: Collection[str] = ()) -> list[Skipped]:
    """Put mean and variance of BatchNorm layers into weight and bias: the same outputs in evaluation, to rounding.

    In training, layers normalize by their batch, for which the new weight is wrong. A channel stays as it is where
    rounding would move its outputs by more than 1e-5 of their usual size: where its mean is more than some hundred
    standard deviations from zero, or values are not finite.

    Args:
        model: Changed in place: means become 0, variances 1.
        names_to_leave: Keys of the state dict that stay as they are.

    Returns:
        The BatchNorm layers that are not merged, and why.
    """
    skipped = []
    for prefixes, norm, obstacle in _norms(model, names_to_leave):
        if obstacle:
            skipped.append(Skipped(prefixes[0] or type(norm).__name__, f"{obstacle}: BatchNorm is not merged"))
        else:
            _merge(norm)
    return skipped


def merged_names(model: nn.Module, names_to_leave: Collection[str] = ()) -> set[str]:
    """Keys of the state dict that `merge_batchnorm` would change."""
    return {
        _key(prefix, vector)
        for prefixes, _, obstacle in _norms(model, names_to_leave)
        if not obstacle
        for prefix in prefixes
        for vector in _VECTORS
    }


@torch.no_grad()
def _merge(norm: _BatchNorm) -> None:
    tensors = [getattr(norm, vector).detach() for vector in _VECTORS]
    weight, bias, mean, variance = (tensor.cpu().double() for tensor in tensors)
    one = math.sqrt(1 + norm.eps)
    slope = weight / (variance + norm.eps).sqrt()
    new_weight = (slope * one).to(tensors[0].dtype)
    new_bias = (bias - slope * mean).to(tensors[1].dtype)
    rounded = new_weight.double() / one
    at_mean = (rounded * mean + new_bias.double() - bias).abs()
    beside = (rounded - slope).abs() * variance.sqrt()  # what one standard deviation adds to it
    good = at_mean + beside <= _CLOSE * (weight.abs() + bias.abs())  # NaN is not
    for tensor, new in zip(
        tensors, (new_weight, new_bias, torch.zeros_like(mean), torch.ones_like(variance)), strict=True
    ):
        tensor.copy_(torch.where(good, new.to(tensor.dtype), tensor.cpu()))


def _norms(model: nn.Module, names_to_leave: Collection[str]) -> Iterator[tuple[list[str], _BatchNorm, str]]:
    """Every BatchNorm layer once: all of its names, and what keeps it from being merged ("" for nothing)."""
    found: dict[int, tuple[list[str], _BatchNorm]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            found.setdefault(id(module), ([], module))[0].append(name)
    state = model.state_dict() if found else {}
    groups = dict(zip(state, sharing(state), strict=True))
    for prefixes, norm in found.values():
        yield prefixes, norm, _obstacle(prefixes, norm, groups, names_to_leave)


def _obstacle(
    prefixes: list[str], norm: _BatchNorm, groups: dict[str, list[str]], names_to_leave: Collection[str]
) -> str:
    """Why a layer is not merged."""
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics (track_running_stats=False), but takes those of each batch"
    if norm.weight is None or norm.bias is None:
        return "it has no weight and bias (affine=False)"
    if type(norm).forward not in _FORWARDS:
        return f"{type(norm).__name__} has a forward of its own"
    own: dict[str, Tensor | None] = {**norm._parameters, **norm._buffers}
    for vector in _VECTORS:
        tensor, key = own.get(vector), _key(prefixes[0], vector)
        if tensor is None or not has_memory(tensor) or key not in groups:
            return f"its {vector} is computed, or is not in the state dict"
        if tensor.dtype not in HALF_DTYPES:
            return f"its {vector} is {str(tensor.dtype).removeprefix('torch.')}, which has too few digits"
        others = set(groups[key]) - {_key(prefix, vector) for prefix in prefixes}
        if others:
            return f"its {vector} is also {min(others)}"
        if not names_to_leave or set(groups[key]).isdisjoint(names_to_leave):
            continue
        return f"its {vector} is to stay as it is"
    return ""


def _key(prefix: str, vector: str) -> str:
    return f"{prefix}.{vector}" if prefix else vector
