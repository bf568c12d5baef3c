"""From one call of a layer in the backward pass to the sums of its weight, and to the relevance of its input."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from zennit.rules import ZBox

from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.relevance.operations import Operation
from lightning_xai_compress.relevance.rules import Part, Rule
from lightning_xai_compress.relevance.statistics import RelevanceSums

__all__ = ["add_shares", "add_squares", "input_relevance", "input_shares"]


def add_squares(
    sums: RelevanceSums, name: str, rows: slice, call: Operation, input: Tensor, weight: Tensor, gradient: Tensor
) -> None:
    """Add what the sums want beside the signed one, for a layer with r = w x c.

    Args:
        sums: Of the whole pass.
        name, rows: The weight.
        call: The layer.
        input, weight: What it was called with.
        gradient: c of its output.
    """
    square = sums.collects("square")
    if square and sums.by_sample and (call.spatial or gradient.dim() > 2):
        for x, c in call.samples(input, gradient):
            sums.add("square", name, rows, call.weight_gradient(x, weight, c).square_())
        square = False
    if sums.collects("absolute"):
        x, c = input.abs(), gradient.abs()
        sums.add("absolute", name, rows, call.weight_gradient(x, weight, c))
        if square:
            sums.add("square", name, rows, call.weight_gradient(x.square_(), weight, c.square_()))
    elif square:
        sums.add("square", name, rows, call.weight_gradient(input.square(), weight, gradient.square()))


def add_shares(
    sums: RelevanceSums, name: str, rows: slice, call: Operation, weight: Tensor, parts: Sequence[Part], rule: Rule
) -> None:
    """Add the shares r / w of a layer with another rule.

    Raises:
        RelevanceError: A statistic has no closed form for the rule.
    """
    alive = [part for part in parts if not part.dead]
    ratios = [torch.where(weight == 0, 0.0, part.weight / weight) for part in alive]
    for part, ratio in zip(alive, ratios, strict=True):
        sums.add_relevance(name, rows, ratio * call.weight_gradient(part.input, weight, part.gradient))
    if sums.collects("square"):
        for first, second in combinations_with_replacement(range(len(alive)), 2):
            if first == second or _overlap(alive[first], alive[second]):
                share = call.weight_gradient(
                    alive[first].input * alive[second].input,
                    weight,
                    alive[first].gradient * alive[second].gradient,
                )
                twice = 1 if first == second else 2
                sums.add("square", name, rows, twice * ratios[first] * ratios[second] * share)
    if sums.collects("absolute"):
        overlaps = any(
            first < second and _overlap(alive[first], alive[second])
            for first, second in combinations_with_replacement(range(len(alive)), 2)
        )
        if not overlaps:
            for part, ratio in zip(alive, ratios, strict=True):
                share = call.weight_gradient(part.input.abs(), weight, part.gradient.abs())
                sums.add("absolute", name, rows, ratio.abs() * share)
        elif isinstance(rule.hook, ZBox) and _in_box(*parts):  # all messages have the sign of the gradient
            sign = alive[0].gradient.sign()
            for part, ratio in zip(alive, ratios, strict=True):
                share = call.weight_gradient(part.input, weight, part.gradient * sign)
                sums.add("absolute", name, rows, ratio * weight.sign() * share)
        else:
            reason = "inputs lie outside of its box" if isinstance(rule.hook, ZBox) else "its parts overlap"
            raise RelevanceError(
                f"mean |r| has no closed form for rule {rule.name} at {rule.layer}, for {reason}: leave 'absolute' and "
                "'positive' out"
            )


def input_shares(call: Operation, input: Tensor, parts: Sequence[Part]) -> Tensor:
    """R / x at the input of a layer: the gradients of the parts, each where its part of the input is not zero."""
    below = torch.zeros_like(input)
    for part in parts:
        if not part.dead:
            gradient = call.input_gradient(input, part.weight, part.gradient)
            below += gradient if part.input is input else torch.where(input == 0, 0.0, part.input / input) * gradient
    return below


def input_relevance(call: Operation, input: Tensor, parts: Sequence[Part], rule: Rule) -> Tensor:
    """R at the input of a layer, for rules that give some to zeros."""
    relevance = torch.zeros_like(input)
    for part in parts:
        gradient = call.input_gradient(input, part.weight, part.gradient)
        relevance += gradient if rule.flat else part.input * gradient
    return relevance


def _in_box(input: Part, low: Part, high: Part) -> bool:
    return bool(((low.input <= input.input) & (input.input <= high.input)).all())


def _overlap(first: Part, second: Part) -> bool:
    """Whether some message gets a contribution of both parts."""
    return (
        bool((first.input * second.input).any())
        and bool((first.gradient * second.gradient).any())
        and bool((first.weight * second.weight).any())
    )
