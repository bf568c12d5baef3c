"""Weights that share values: a codebook a layer or block of channels, by k-means in one dimension, weighted or not.

A codebook of `bits` has 2^(bits - 1) - 1 values on either side of zero, which is always one of its own: 3 values for 2
bits, 15 for 4, 255 for 8. So codes are those of a grid of the same width, and what stores them is the same. Values are
rounded to bfloat16, as scales are. Weighted by the mean of (R / w)^2, k-means minimises what relevance says that
errors cost (Sabih et al. 2020, arXiv 2008.09072, cluster by importance, too).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fit_codebook", "nearest_codes", "refit_codebook"]

_BINS = 512  # that the exact search knows; fewer different values are searched exactly
_POLISH = 8  # steps of Lloyd's on all values


def fit_codebook(weight: Tensor, bits: int, importance: Tensor | None = None, *, blocks: int = 1) -> Tensor:
    """Find the values of least squared error for a layer, or for each of its blocks of channels.

    On each side of zero the exact solution for up to 512 bins of equally many weights, by dynamic programming, zero's
    own cluster included; then Lloyd's algorithm on the weights themselves.

    Args:
        weight: Shape [channels, ...]; zeros count nothing.
        bits: 2..8.
        importance: What a unit of squared error of each weight costs, >= 0, same shape; None, or all zero in a block:
            the same.
        blocks: Of consecutive channels; divides them.

    Returns:
        float32 of shape [blocks, 2^bits - 1], exact in bfloat16, rising, zero in the middle.
    """
    values = weight.detach().double().cpu().reshape(blocks, -1)
    costs = torch.ones_like(values) if importance is None else importance.detach().double().cpu().reshape(blocks, -1)
    found = [_fitted(*block, bits) for block in zip(values, costs, strict=True)]
    return torch.cat(found).to(weight.device)


def _fitted(values: Tensor, costs: Tensor, bits: int) -> Tensor:
    """For one block; shape [1, 2^bits - 1]."""
    if not bool((costs > 0).any()):
        costs = torch.ones_like(values)
    count = 2 ** (bits - 1) - 1
    sides = [_side(side[side > 0], costs[side > 0], count) for side in (values, -values)]
    found = torch.cat([-sides[1].flip(0), torch.zeros(1, dtype=torch.float64), sides[0]])
    found = _round(found).unsqueeze(0)
    for _ in range(_POLISH):
        moved = refit_codebook(values, nearest_codes(values, found), found, costs)
        if torch.equal(moved, found):
            break
        found = moved
    return found


def _side(values: Tensor, costs: Tensor, count: int) -> Tensor:
    """Rising centroids of positive values; those there is no use for repeat the largest."""
    if not len(values):
        return torch.ones(count, dtype=torch.float64)
    order = values.argsort()
    values, costs = values[order], costs[order]
    edges = torch.linspace(0, len(values), min(_BINS, len(values)) + 1).round().long()
    # sums up to each edge: of costs, of costs times values, and of costs times squares
    sums = [torch.cat([torch.zeros(1).double(), (costs * values**power).cumsum(0)])[edges] for power in range(3)]
    mass, first, second = (each[None, :] - each[:, None] for each in sums)  # [from, to]
    spread = (second - first.square() / mass.clamp(min=torch.finfo(mass.dtype).tiny)).clamp(min=0)
    bins = len(edges)
    spread = spread.masked_fill(torch.ones(bins, bins).tril(-1).bool(), torch.inf)
    best, back = sums[2] - sums[2][0], []  # the first bins belong to zero
    for _ in range(count):
        best, place = (best[:, None] + spread).min(0)
        back.append(place)
    end, found = bins - 1, list[Tensor]()
    for place in reversed(back):
        start = int(place[end])
        if mass[start, end] > 0:
            found.append(first[start, end] / mass[start, end])
        end = start
    found = found[::-1] or [values[-1]]
    return torch.stack([*found, *[found[-1]] * (count - len(found))])


def nearest_codes(weight: Tensor, codebook: Tensor) -> Tensor:
    """The place of the nearest value, counted from zero's: int8 in the shape of the weight; zero stays zero."""
    middles = (codebook[:, 1:] + codebook[:, :-1]) / 2
    values = weight.detach().to(middles.dtype).reshape(len(codebook), -1).contiguous()
    places = torch.searchsorted(middles.contiguous(), values).reshape(weight.shape) - codebook.shape[1] // 2
    return places.masked_fill_(weight == 0, 0).to(torch.int8)


def refit_codebook(weight: Tensor, codes: Tensor, codebook: Tensor, importance: Tensor | None = None) -> Tensor:
    """Move each value to the weighted mean of its weights; zero, and a value without weights, stay.

    Args:
        weight: Shape [channels, ...].
        codes: Of each weight, from `nearest_codes`.
        codebook: So far, shape [blocks, values].
        importance: As for `fit_codebook`.
    """
    blocks, count = codebook.shape
    places = codes.reshape(blocks, -1).to(torch.int64) + count // 2
    values = weight.detach().reshape(blocks, -1).double()
    costs = torch.ones_like(values) if importance is None else importance.reshape(blocks, -1).to(values)
    mass, total = (torch.zeros(blocks, count, dtype=values.dtype, device=values.device) for _ in range(2))
    mass.scatter_add_(1, places, costs)
    total.scatter_add_(1, places, costs * values)
    moved = torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), codebook.to(values))
    moved[:, count // 2] = 0.0
    return _round(moved)


def _round(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).float()
