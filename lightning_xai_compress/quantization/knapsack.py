"""One choice for every item under a budget: a knapsack by its Lagrangian, and tiers by rank.

An item is what gets one bit width: a layer, a channel, or a group of input channels. Its options are the widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["knapsack", "lower_bound", "tiers"]

_HALVINGS = 100


def knapsack(cost: Tensor, price: Tensor, budget: float) -> Tensor:
    """Choose the options of least total cost whose total price is within a budget.

    The Lagrangian of this knapsack falls apart by item: at a rate of cost per unit of price each item takes its
    cheapest option, and the rate is bisected until the budget is met from below; single items then use up the rest.

    Args:
        cost: Of every option, float64 of shape [items, options], >= 0; infinite where an item must not take it.
        price: The same shape, >= 0.
        budget: At least the sum of the lowest prices.

    Returns:
        The option of each item, int64 of shape [items]; the first one of those that are alike.
    """
    high = _rate(cost, price, budget)[1]
    choice = _cheapest(cost, price, high)
    return _use_up(choice, cost, price, budget - _total(price, choice))


def lower_bound(cost: Tensor, price: Tensor, budget: float) -> float:
    """What no choice within the budget can cost less than: the largest value found of the Lagrangian dual.

    Args:
        cost, price, budget: As in `knapsack`.
    """
    bounds = [0.0]
    for rate in _rate(cost, price, budget):
        choice = _cheapest(cost, price, rate)
        bounds.append(_total(cost, choice) + rate * (_total(price, choice) - budget))
    return max(bounds)


def tiers(rank: Tensor, size: Tensor, cost: Tensor, price: Tensor, budget: float) -> Tensor:
    """Choose later (wider) options for items of higher rank, whatever the cost.

    Tiers hold shares of the size that grow or fall by one factor a width, and are equal where the budget is that of
    equal tiers: of all shares of that mean they are the most even ones. The factor is bisected until the budget is met
    from below; items on the border of two tiers then use up the rest. No item gets less than one of lower rank.

    Args:
        rank: Of each item, shape [items].
        size: Weights of each item, float64 of shape [items].
        cost: As in `knapsack`; only what is infinite matters. Items with several options share the same ones.
        price: As in `knapsack`, rising with the options.
        budget: At least the sum of the lowest prices.

    Returns:
        The option of each item, int64 of shape [items].
    """
    choice = torch.where(cost.isfinite(), price, torch.inf).argmin(1)
    free = (cost.isfinite().sum(1) > 1).nonzero().squeeze(1)
    if not len(free):
        return choice
    options = cost[free[0]].isfinite().nonzero().squeeze(1)
    order = free[rank[free].argsort(stable=True)]
    prices, middle = price[order][:, options], size[order].cumsum(0) - size[order] / 2
    left = budget - (_total(price, choice) - _total(price[free], choice[free]))
    even = torch.arange(len(options), dtype=torch.float64)

    def tier(tilt: float) -> Tensor:
        borders = (tilt * even).softmax(0).cumsum(0)[:-1] * float(size[order].sum())
        return torch.bucketize(middle, borders)

    low, high = -50.0, 50.0  # all in the first tier, all in the last one
    if _total(prices, tier(high)) <= left:
        low = high
    for _ in range(_HALVINGS):
        tilt = (low + high) / 2
        low, high = (tilt, high) if _total(prices, tier(tilt)) <= left else (low, tilt)
    chosen = _move_borders(tier(low), prices, left)
    choice[order] = options[chosen]
    return choice


def _cheapest(cost: Tensor, price: Tensor, rate: float) -> Tensor:
    return (cost + rate * price).argmin(1)


def _total(values: Tensor, choice: Tensor) -> float:
    return float(values.gather(1, choice.unsqueeze(1)).sum())


def _rate(cost: Tensor, price: Tensor, budget: float) -> tuple[float, float]:
    """Rates around that at which the budget is met: just above it and just within it."""

    def fits(rate: float) -> bool:
        return _total(price, _cheapest(cost, price, rate)) <= budget

    low, high = 0.0, 1.0
    if fits(low):
        return low, low
    while not fits(high):
        high *= 4
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return low, high


def _use_up(choice: Tensor, cost: Tensor, price: Tensor, left: float) -> Tensor:
    """Change single items, best gain for its price first, while the rest of the budget lasts."""
    choice = choice.clone()
    while True:
        chosen = choice.unsqueeze(1)
        gain = cost.gather(1, chosen) - cost
        extra = price - price.gather(1, chosen)
        usable = (gain > 0) & (extra <= left)
        worth, option = torch.where(usable, gain / extra.clamp(min=1e-9), 0.0).max(1)
        items = worth.nonzero().squeeze(1)
        if not len(items):
            return choice
        for item in items[worth[items].argsort(descending=True, stable=True)].tolist():
            step = float(extra[item, option[item]])
            if step <= left:
                choice[item] = option[item]
                left -= step


def _move_borders(tier: Tensor, price: Tensor, left: float) -> Tensor:
    """Lift the item of highest rank in a tier into the next one, from the top, while the rest of the budget lasts.

    Args:
        tier: int64 of shape [items], not falling.
        price: Shape [items, tiers].
        left: Budget for all items.
    """
    tier = tier.clone()
    left -= _total(price, tier)
    last = int(price.shape[1]) - 1
    while True:
        ends = [int((tier <= each).sum()) - 1 for each in range(last)]
        for item in reversed(dict.fromkeys(ends)):  # where a tier is empty, its end is that of the one below
            if item < 0:
                continue
            step = float(price[item, tier[item] + 1] - price[item, tier[item]])
            if step <= left:
                tier[item] += 1
                left -= step
                break
        else:
            return tier
