"""More bits for more relevance: a width for every layer, output channel or group of input channels, under a budget.

What takes long, the error of every row at every width, is measured once (`measure_widths`); to choose among them under
a budget is quick, and can be done again and again (`WidthCosts.choose`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_xai_compress.plan import BitAllocation, ScoreMap, by_rows, look_up
from lightning_xai_compress.quantization.codebook import fit_codebook, nearest_codes
from lightning_xai_compress.quantization.grid import fit_scales, quantize
from lightning_xai_compress.quantization.knapsack import knapsack, lower_bound, tiers
from lightning_xai_compress.quantization.widths import check_bits, fixed_widths

__all__ = [
    "Allocated",
    "BitsPer",
    "Price",
    "Quantizer",
    "Strategy",
    "WidthCosts",
    "allocate_bits",
    "measure_widths",
    "row_count",
]

_VALUE_BITS = 16  # of a codebook, in files
Strategy = Literal["knapsack", "ranked"]
BitsPer = Literal["layer", "channel", "group"]
Quantizer = Literal["uniform", "codebook"]
Price = Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Allocated:
    """What was chosen.

    Args:
        allocation: The widths.
        scales: Those of least squared error at these widths, float32 of shape [rows] by parameter name.
        cost: Squared quantization error times sensitivity, summed over weights.
        bound: What no choice of widths within the same budget can cost less than.
        bytes: What the weights take at the price that was measured.
        codebooks: Those of the layers that share values.
    """

    allocation: BitAllocation
    scales: Mapping[str, Tensor]
    cost: float
    bound: float
    bytes: float
    codebooks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """Share of the cost that a better choice could save at most, in [0, 1]."""
        return (self.cost - self.bound) / self.cost if self.cost > self.bound else 0.0


@dataclass(frozen=True)
class WidthCosts:
    """What every item (layer, channel or group) costs at every width, as `measure_widths` finds it.

    Args:
        widths: All that some item may take, ascending.
        cost: Squared error times sensitivity, float64 of shape [items, widths]; infinite where a width is not allowed.
        price: Bits that the item takes, the same shape.
        size: Weights of each item, float64 of shape [items].
        rank: Relevance of a weight of each item, float64 of shape [items].
        forced: Who has no choice, for error messages.
        items: The item of each row, int64 of shape [rows], by parameter name.
        scales: Of least squared error, float32 of shape [rows, widths], by parameter name.
        row_size: Weights of a row by parameter name.
        codebooks: One a width, by parameter name, of layers that share values.
    """

    widths: tuple[int, ...]
    cost: Tensor
    price: Tensor
    size: Tensor
    rank: Tensor
    forced: tuple[str, ...]
    items: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    row_size: Mapping[str, int]
    codebooks: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def choose(
        self, average_bits: float | None = None, *, max_bytes: float | None = None, strategy: Strategy = "knapsack"
    ) -> Allocated:
        """Choose a width for each item within one of two budgets.

        Args:
            average_bits: Mean width over all weights, pruned ones included.
            max_bytes: Bytes of all weights at the price that was measured.
            strategy: "knapsack": least cost. "ranked": tiers by relevance; no item with a choice gets fewer bits than
                one of less relevance.

        Raises:
            ValueError: Not one budget; a budget that cannot be met; a strategy that does not exist.
        """
        if (average_bits is None) == (max_bytes is None):
            raise ValueError(f"give one of average_bits={average_bits} and max_bytes={max_bytes}")
        if strategy not in ("knapsack", "ranked"):
            raise ValueError(f"strategy must be 'knapsack' or 'ranked', got {strategy!r}")
        weights = float(self.size.sum())
        if average_bits is not None:
            label, budget = f"average_bits={average_bits}", average_bits * weights
            price = self.size.unsqueeze(1) * torch.tensor(self.widths, dtype=torch.float64)
        else:
            label, budget, price = f"max_bytes={max_bytes}", 8 * float(max_bytes or 0), self.price
        least = float(torch.where(self.cost.isfinite(), price, torch.inf).amin(1).sum())
        if least > budget * (1 + 1e-9):
            found = f"the mean {least / weights:.2f}" if max_bytes is None else f"{least / 8:.0f} bytes"
            reasons = ", ".join([*self.forced, f"with the smallest width for {'all else' if self.forced else 'all'}"])
            raise ValueError(
                f"{label} cannot be met: {reasons} it is {found}; raise the budget, offer smaller widths, or exclude "
                "layers"
            )
        budget = max(budget, least)  # equal but for rounding
        if strategy == "knapsack":
            choice = knapsack(self.cost, price, budget)
        else:
            choice = tiers(self.rank, self.size, self.cost, price, budget)
        return self._allocated(choice, lower_bound(self.cost, price, budget))

    def _allocated(self, choice: Tensor, bound: float) -> Allocated:
        bits, scales, codebooks = {}, {}, {}
        every = torch.tensor(self.widths, dtype=torch.uint8)
        for name, items in self.items.items():
            chosen, device = choice[items], self.scales[name].device
            bits[name] = every[chosen].to(device)
            scales[name] = self.scales[name].gather(1, chosen.to(device).unsqueeze(1)).squeeze(1)
            if name in self.codebooks:
                codebooks[name] = self.codebooks[name][int(chosen[0])].to(device)
        at = choice.unsqueeze(1)
        cost, taken = float(self.cost.gather(1, at).sum()), float(self.price.gather(1, at).sum())
        allocation = BitAllocation(bits, dict(self.row_size))
        return Allocated(allocation, scales, cost, min(bound, cost), taken / 8, codebooks)


def allocate_bits(
    weights: Mapping[str, Tensor],
    scores: ScoreMap | None,
    *,
    average_bits: float | None = None,
    max_bytes: float | None = None,
    bits: Sequence[int] = (2, 3, 4, 6, 8),
    strategy: Strategy = "knapsack",
    bits_per: BitsPer = "channel",
    group_size: int | None = None,
    widths: Mapping[str, int] | None = None,
    price: Price | None = None,
    quantizer: Quantizer = "uniform",
    codebook_channels: int | None = None,
) -> Allocated:
    """Spend a budget of bits or bytes where it saves the most relevance.

    Minimises the sum over weights of sensitivity times squared quantization error, or shares widths out by rank.

    Args:
        weights, scores, bits, bits_per, group_size, widths, price, quantizer, codebook_channels: See `measure_widths`.
        average_bits, max_bytes, strategy: See `WidthCosts.choose`.

    Raises:
        ValueError: See `check_bits`, `measure_widths` and `WidthCosts.choose`.
    """
    check_bits(bits, average_bits, (widths or {}).values())
    costs = measure_widths(
        weights, scores, bits=bits, bits_per=bits_per, group_size=group_size, widths=widths, price=price,
        quantizer=quantizer, codebook_channels=codebook_channels,
    )  # fmt: skip
    return costs.choose(average_bits, max_bytes=max_bytes, strategy=strategy)


def measure_widths(
    weights: Mapping[str, Tensor],
    scores: ScoreMap | None,
    *,
    bits: Sequence[int] = (2, 3, 4, 6, 8),
    bits_per: BitsPer = "channel",
    group_size: int | None = None,
    widths: Mapping[str, int] | None = None,
    price: Price | None = None,
    quantizer: Quantizer = "uniform",
    codebook_channels: int | None = None,
) -> WidthCosts:
    """Fit scales at every width, and see what errors they leave.

    Args:
        weights: Masked weights by parameter name, shape [channels, ...].
        scores: Their `sensitivity` says what a unit of squared error costs. Where it is unknown (NaN) for some weights
            of a layer (tokens that no sample had, say), they count as the mean of those known; layers wholly unknown
            get the largest width. None: errors alone count.
        bits: Widths to choose from, each in 2..8.
        bits_per: What gets one width: "layer", "channel" (row of the weight) or "group" (of input channels in a row).
        group_size: Input channels of a group, see `row_count`; for "group" alone.
        widths: Patterns of weights whose width is fixed, see `fixed_widths`; they need not be among `bits`.
        price: Gives the bits of every row, by parameter name, for the integer codes (int8 of shape [rows, columns], by
            parameter name) that all weights have at a width; called once a width. None: width times weights.
        quantizer: "uniform": a grid with a scale for each row. "codebook": 2^bits - 1 values that a layer shares, from
            k-means weighted by sensitivity, see `fit_codebook`; with bits_per="layer" alone.
        codebook_channels: Output channels that share a codebook; None, or where it does not divide those of a layer:
            all of them.

    Raises:
        ValueError: A setting out of range, or a pattern that matches nothing.
    """
    if bits_per not in ("layer", "channel", "group"):
        raise ValueError(f"bits_per must be 'layer', 'channel' or 'group', got {bits_per!r}")
    if (bits_per == "group") != (group_size is not None):
        raise ValueError(
            f"bits_per='group' goes with a group_size, and nothing else does: got {bits_per}, {group_size}"
        )
    if quantizer not in ("uniform", "codebook"):
        raise ValueError(f"quantizer must be 'uniform' or 'codebook', got {quantizer!r}")
    if quantizer == "codebook" and bits_per != "layer":
        raise ValueError(f"quantizer='codebook' has one codebook a layer: use bits_per='layer', not {bits_per!r}")
    offered = check_bits(bits, None)
    fixed = fixed_widths(weights, widths or {})
    every = tuple(sorted({*offered, *fixed.values()}))
    rows = {name: by_rows(weights[name].detach(), row_count(weights[name], group_size)) for name in sorted(weights)}
    sensitivity, unknown = {}, set()
    for name, own in rows.items():
        sensitivity[name] = _sensitivity(scores, name, own)
        if not bool(sensitivity[name].isfinite().all()):
            unknown.add(name)
    allowed = {name: offered if name not in unknown else offered[-1:] for name in rows}
    allowed |= {name: (width,) for name, width in fixed.items()}
    table = _Table(rows, every, codebook_channels, shared=quantizer == "codebook")
    for column, width in enumerate(every):
        measured = [name for name in rows if width in allowed[name]]
        for name in measured:
            table.measure(name, column, None if name in unknown else sensitivity[name])
        table.set_price(column, measured, price)
    return table.costs(bits_per, _ranks(rows, scores, sensitivity, unknown), _forced(rows, fixed, unknown, offered[-1]))


def row_count(weight: Tensor, group_size: int | None = None) -> int:
    """How many rows with a bit width and a scale a weight has.

    Args:
        weight: Shape [channels, inputs, ...].
        group_size: Input channels of a row; None, or one that does not divide the inputs: all of them.

    Raises:
        ValueError: A group size below 1.
    """
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be >= 1, got {group_size}")
    if group_size is None or weight.dim() < 2 or weight.shape[1] % group_size:
        return len(weight)
    return len(weight) * (weight.shape[1] // group_size)


def block_count(channels: int, codebook_channels: int | None) -> int:
    """How many codebooks so many channels have.

    Raises:
        ValueError: Not one channel for a codebook.
    """
    if codebook_channels is not None and codebook_channels < 1:
        raise ValueError(f"codebook_channels must be >= 1, got {codebook_channels}")
    return 1 if codebook_channels is None or channels % codebook_channels else channels // codebook_channels


class _Table:
    """Costs, prices and scales of all rows, as they are measured."""

    def __init__(
        self, rows: Mapping[str, Tensor], widths: tuple[int, ...], codebook_channels: int | None, *, shared: bool
    ) -> None:
        self.rows, self.widths = rows, widths
        self.blocks = {name: block_count(len(own), codebook_channels) for name, own in rows.items()}
        self.codebooks = {
            name: [own.new_zeros(self.blocks[name], 2**width - 1).float() for width in widths]
            for name, own in rows.items()
        }
        self._shared = shared
        self.row_size = {name: own[0].numel() for name, own in rows.items()}
        shape = {name: (len(own), len(widths)) for name, own in rows.items()}
        self.cost = {name: torch.full(shape[name], torch.inf, dtype=torch.float64) for name in rows}
        self.price = {name: torch.zeros(shape[name], dtype=torch.float64) for name in rows}
        self.scales = {name: torch.zeros(shape[name], device=own.device) for name, own in rows.items()}

    def measure(self, name: str, column: int, sensitivity: Tensor | None) -> None:
        """Fit scales at one width; where no sensitivity is known, errors count nothing."""
        if self._shared:
            rows = self.rows[name].float()
            weighing = sensitivity if sensitivity is not None and sensitivity.dim() else None
            codebook = fit_codebook(rows, self.widths[column], weighing, blocks=self.blocks[name])
            self.codebooks[name][column] = codebook
            squared = look_up(nearest_codes(rows, codebook), codebook).sub_(rows).square_()
            scale = torch.ones(len(rows), device=rows.device)
        else:
            scale, squared = fit_scales(self.rows[name], self.widths[column])
        self.scales[name][:, column] = scale
        error = squared.mul_(0.0 if sensitivity is None else sensitivity).flatten(1).sum(1, dtype=torch.float64)
        self.cost[name][:, column] = error.cpu()

    def set_price(self, column: int, names: Sequence[str], price: Price | None) -> None:
        """Ask what the rows take at one width."""
        width = self.widths[column]
        if price is None:
            for name in names:
                self.price[name][:, column] = width * self.row_size[name]
            return
        prices = price({name: self._codes(name, column) for name in names}, width)
        for name in names:
            held = self.codebooks[name][column].numel() * _VALUE_BITS if self._shared else 0
            self.price[name][:, column] = prices[name].to(self.price[name]) + held / len(self.rows[name])

    def _codes(self, name: str, column: int) -> Tensor:
        if self._shared:
            return nearest_codes(self.rows[name].flatten(1).float(), self.codebooks[name][column])
        scale = self.scales[name][:, column].contiguous()
        bits = torch.full(scale.shape, self.widths[column], dtype=torch.uint8, device=scale.device)
        values = quantize(self.rows[name].flatten(1).float(), bits, scale)
        return values.div_(torch.where(scale > 0, scale, 1.0).unsqueeze(1)).round_().to(torch.int8)

    def costs(self, bits_per: BitsPer, ranks: Mapping[str, Tensor], forced: tuple[str, ...]) -> WidthCosts:
        """All rows of a layer are one item, or each one is."""
        items: dict[str, Tensor] = {}
        count = 0
        for name, own in self.rows.items():
            one = bits_per == "layer"
            items[name] = torch.full((len(own),), count) if one else torch.arange(count, count + len(own))
            count += 1 if one else len(own)

        def total(values: Mapping[str, Tensor]) -> Tensor:
            first = next(iter(values.values()))
            sums = torch.zeros(count, *first.shape[1:], dtype=torch.float64)
            return sums.index_add_(0, torch.cat([*items.values()]), torch.cat([values[name] for name in items]))

        sizes = {name: torch.full((len(own),), float(self.row_size[name])).double() for name, own in self.rows.items()}
        size = total(sizes)
        return WidthCosts(
            self.widths,
            total(self.cost),
            total(self.price),
            size,
            total(ranks) / size.clamp(min=1.0),
            forced,
            items,
            self.scales,
            self.row_size,
            self.codebooks if self._shared else {},
        )


def _sensitivity(scores: ScoreMap | None, name: str, rows: Tensor) -> Tensor:
    """As rows; unknown weights as the mean of the known ones, all NaN where none is known."""
    if scores is None:
        return torch.ones((), device=rows.device)
    sensitivity = scores.sensitivity[name].to(rows.device).reshape(rows.shape)
    unknown = sensitivity.isnan()
    return torch.where(unknown, sensitivity.nanmean(), sensitivity) if bool(unknown.any()) else sensitivity


def _ranks(
    rows: Mapping[str, Tensor], scores: ScoreMap | None, sensitivity: Mapping[str, Tensor], unknown: set[str]
) -> dict[str, Tensor]:
    """Magnitude of relevance, summed over each row: the root mean square over samples, of the weights as they are now.

    Scores without a sign have no such thing, and rank themselves.
    """
    ranks = {}
    for name, own in rows.items():
        if name in unknown:
            ranks[name] = torch.zeros(len(own), dtype=torch.float64)
            continue
        each = sensitivity[name].sqrt() * own.abs()
        if scores is not None and not scores.signed:
            each = scores.score[name].to(own.device).reshape(own.shape).nan_to_num() * (own != 0)
        ranks[name] = each.flatten(1).sum(1, dtype=torch.float64).cpu()
    return ranks


def _forced(rows: Mapping[str, Tensor], fixed: Mapping[str, int], unknown: set[str], largest: int) -> tuple[str, ...]:
    reasons = [f"{name} is fixed at {width} bits" for name, width in fixed.items()]
    count = sum(len(rows[name]) for name in unknown - set(fixed))
    return (*reasons, *([f"{count} channels of unknown relevance keep {largest} bits"] if count else []))
