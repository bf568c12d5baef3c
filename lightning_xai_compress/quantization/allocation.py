"""More bits for more relevance: a width for every output channel under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_xai_compress.checks import check_number
from lightning_xai_compress.plan import MAX_BITS, MIN_BITS, BitAllocation, ScoreMap
from lightning_xai_compress.quantization.grid import fit_scales

__all__ = ["allocate_bits", "check_bits"]


def check_bits(bits: Sequence[int], average_bits: float) -> tuple[int, ...]:
    """Validate widths and budget; returns the widths sorted and once each.

    Raises:
        ValueError: A width outside 2..8, none at all, or a budget that the widths cannot meet.
    """
    if not isinstance(bits, list | tuple):
        raise ValueError(f"bits must be a list of widths such as [2, 4, 8], got {bits!r}")
    widths = tuple(sorted({check_number("each of bits", width, whole=True) for width in bits}))
    average_bits = check_number("average_bits", average_bits)
    if not widths:
        raise ValueError("bits must name at least one width")
    if not MIN_BITS <= widths[0] <= widths[-1] <= MAX_BITS:
        raise ValueError(f"bits must be whole numbers in {MIN_BITS}..{MAX_BITS}, got {tuple(bits)}")
    if not widths[0] <= average_bits <= widths[-1]:
        raise ValueError(
            f"average_bits must lie between the smallest and the largest of bits={widths}, got {average_bits}"
        )
    return widths


def allocate_bits(
    weights: Mapping[str, Tensor],
    scores: ScoreMap,
    *,
    average_bits: float,
    bits: Sequence[int] = (2, 3, 4, 6, 8),
) -> tuple[BitAllocation, dict[str, Tensor]]:
    """Spend a bit budget where it saves the most relevance.

    Minimises the sum over weights of sensitivity times squared quantization error, subject to the mean width over all
    weights. The Lagrangian of this knapsack falls apart by channel: at a price per bit each channel takes its
    cheapest width, and the price is bisected until the budget is met from below; single channels then use up the rest.

    Args:
        weights: Masked weights by parameter name, shape [channels, ...].
        scores: Sensitivity of every weight. Where it is unknown (NaN) for some weights of a layer (tokens that no
            sample had, say), they count as the mean of those known; layers wholly unknown get the largest width.
        average_bits: Budget: mean width over all weights, pruned ones included.
        bits: Widths to choose from, each in 2..8.

    Returns:
        The widths, and the scales of least squared error that go with them.

    Raises:
        ValueError: See `check_bits`; or the channels of unknown sensitivity alone exceed the budget.
    """
    widths = check_bits(bits, average_bits)
    names = sorted(weights)
    scales = {name: [] for name in names}  # type: dict[str, list[Tensor]]
    costs, sizes = [], []
    for name in names:
        errors = []
        sensitivity = _filled(scores.sensitivity[name]).to(weights[name].device)
        for width in widths:
            scale, squared = fit_scales(weights[name], width)
            scales[name].append(scale)
            errors.append((sensitivity * squared).flatten(1).sum(1, dtype=torch.float64))
        costs.append(torch.stack(errors, 1).cpu())
        sizes.append(torch.full((len(costs[-1]),), weights[name][0].numel(), dtype=torch.float64))
    chosen = _knapsack(torch.cat(costs), torch.cat(sizes), torch.tensor(widths, dtype=torch.float64), average_bits)
    allocation: dict[str, Tensor] = {}
    fitted: dict[str, Tensor] = {}
    for name, choice in zip(names, chosen.split([len(cost) for cost in costs]), strict=True):
        device = weights[name].device
        allocation[name] = torch.tensor(widths, dtype=torch.uint8)[choice].to(device)
        fitted[name] = torch.stack(scales[name], 1).gather(1, choice.to(device).unsqueeze(1)).squeeze(1)
    return BitAllocation(allocation, {name: weights[name][0].numel() for name in names}), fitted


def _filled(sensitivity: Tensor) -> Tensor:
    """Unknown weights as the mean of the known ones; all NaN where none is known."""
    unknown = sensitivity.isnan()
    return torch.where(unknown, sensitivity.nanmean(), sensitivity) if bool(unknown.any()) else sensitivity


def _knapsack(cost: Tensor, size: Tensor, widths: Tensor, average_bits: float) -> Tensor:
    """Index of the width of each channel: cost [channels, widths], size [channels]."""
    unknown = cost.isnan().any(1)
    cost = torch.where(unknown.unsqueeze(1), 0.0, cost)
    price_of = size.unsqueeze(1) * widths
    budget = average_bits * float(size.sum())
    forced = float((size[unknown] * widths[-1] + 0.0).sum() + (size[~unknown] * widths[0]).sum())
    if forced > budget * (1 + 1e-9):
        raise ValueError(
            f"average_bits={average_bits} cannot be met: {int(unknown.sum())} channels of unknown relevance keep "
            f"{int(widths[-1])} bits, which alone makes the mean {forced / float(size.sum()):.2f}; raise average_bits "
            "or exclude their layers"
        )
    budget = max(budget, forced)  # equal but for rounding

    def choose(price: float) -> Tensor:
        choice = (cost + price * price_of).argmin(1)  # the narrower of two that cost the same
        return torch.where(unknown, len(widths) - 1, choice)

    def spent(choice: Tensor) -> float:
        return float(price_of.gather(1, choice.unsqueeze(1)).sum())

    low, high = 0.0, 1.0
    if spent(choose(low)) <= budget:
        return choose(low)
    while spent(choose(high)) > budget:
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(choose(middle)) > budget else (low, middle)
    choice = choose(high)
    return _use_up(choice, cost, size, widths, budget - spent(choice), unknown)


def _use_up(choice: Tensor, cost: Tensor, size: Tensor, widths: Tensor, left: float, fixed: Tensor) -> Tensor:
    """Widen single channels, best gain a bit first, while the rest of the budget lasts."""
    choice = choice.clone()
    wider = (choice + 1).clamp(max=len(widths) - 1)
    extra = size * (widths[wider] - widths[choice])
    gain = (cost.gather(1, choice.unsqueeze(1)) - cost.gather(1, wider.unsqueeze(1))).squeeze(1)
    worth = torch.where((extra > 0) & ~fixed, gain / extra.clamp(min=1.0), -1.0)
    for channel in worth.argsort(descending=True, stable=True).tolist():
        if worth[channel] <= 0:
            break
        if extra[channel] <= left:
            choice[channel] = wider[channel]
            left -= float(extra[channel])
    return choice
