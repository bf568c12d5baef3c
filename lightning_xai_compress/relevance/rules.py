"""Rules that change inputs or weights (z+, alpha-beta, gamma, z-box, flat, w-square), run from zennit's callables.

A zennit `BasicHook` says what a rule is: modified copies (x_k, w_k, b_k) of input and parameters, a map from the
relevance of the output to one gradient s_k for each, and how input relevance is put together. With a_k the coefficient
of part k:

    R_x = sum_k a_k x_k (w_k^T s_k)        R_w = sum_k a_k w_k (x_k * s_k)

where * is the weight gradient. Only public callables are run; coefficients are found by probing the reducer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import BasicHook, ParamMod

from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.relevance.operations import Operation

__all__ = ["Part", "Rule", "RuledOutput", "make_rule"]


@dataclass(frozen=True)
class Part:
    """One modified copy of a layer in one backward pass.

    Args:
        input: x_k.
        weight: w_k.
        gradient: a_k s_k.
        dead: Whether it passes nothing on, since x_k is zero.
    """

    input: Tensor
    weight: Tensor
    gradient: Tensor
    dead: bool


@dataclass(frozen=True)
class Rule:
    """What the engine needs to know of a zennit rule.

    Args:
        name: Its class, for messages.
        layer: The layer's name, for messages.
        hook: Its callables.
        coefficients: a_k.
        flat: Whether R_x is the gradient alone, without the input: Flat and WSquare.
        input_bound: Whether inputs that are zero get relevance, so that R / x does not exist.
    """

    name: str
    layer: str
    hook: BasicHook
    coefficients: tuple[float, ...]
    flat: bool
    input_bound: bool

    def parts(
        self,
        operation: Operation,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor,
        relevance: Tensor,
    ) -> list[Part]:
        """Run the rule for one call.

        Args:
            operation: The layer.
            input, weight, bias: What it was called with.
            z: Its output.
            relevance: R of the output, shape of `z`.
        """
        hook = self.hook
        copies: list[tuple[Tensor, Tensor, bool]] = []
        outputs: list[Tensor] = []
        for modify_input, modify_weight, modify_output in zip(
            hook.input_modifiers, hook.param_modifiers, hook.output_modifiers, strict=True
        ):
            x = modify_input(input)
            w, b = _modified(modify_weight, weight, bias)
            dead = x is not input and not bool(x.any())
            if x is input and w is weight and b is bias:
                y = z
            elif dead:
                y = z.new_zeros(()) if b is None else b.view(-1, *[1] * operation.spatial)
            else:
                y = operation(x, w, b)
            if modify_output(y) is not y:
                raise RelevanceError(f"rule {self.name} at {self.layer}: rules that modify outputs are not supported")
            copies.append((x, w, dead))
            outputs.append(y)
        gradients = hook.gradient_mapper(relevance, outputs)
        gradients = [gradients] if isinstance(gradients, Tensor) else list(gradients)
        return [
            Part(x, w, gradient if factor == 1 else factor * gradient, dead or factor == 0)
            for (x, w, dead), gradient, factor in zip(copies, gradients, self.coefficients, strict=True)
        ]


class RuledOutput(torch.autograd.Function):
    """The output of a layer, whose backward is a rule.

    `backward` is called with R / z at the output, and gives R / x at the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        compute: Callable[[], Tensor],
        backward: Callable[[Tensor, bool], Tensor | None],
    ) -> Tensor:
        """Compute the output."""
        ctx.relevance = backward
        return compute()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Apply the rule."""
        return ctx.relevance(gradients[0], ctx.needs_input_grad[0]), None, None, None


def make_rule(hook: Any, layer: str) -> Rule:
    """Read a zennit rule for a linear layer.

    Raises:
        RelevanceError: It has no per-weight form; names rule and layer.
    """
    name = type(hook).__name__
    if not isinstance(hook, BasicHook):
        raise RelevanceError(
            f"rule {name} at {layer} has no per-weight form: it does not say how relevance is shared among weights. "
            "Rules that do: Epsilon, ZPlus, AlphaBeta, Gamma, Norm, and for the input layer ZBox, Flat, WSquare"
        )
    count = len(hook.input_modifiers)
    generator = torch.Generator().manual_seed(0)
    inputs = list(torch.randn(count, 8, generator=generator, dtype=torch.float64).unbind())  # of both signs
    gradients = list(torch.randn(count, 8, generator=generator, dtype=torch.float64).unbind())

    def reduced(each: list[Tensor], which: int | None = None) -> Tensor:
        chosen = [g if which in (None, k) else torch.zeros_like(g) for k, g in enumerate(gradients)]
        result: Tensor = hook.reducer(each, chosen)
        return result

    flat = bool(reduced([torch.zeros_like(x) for x in inputs]).any())
    terms = gradients if flat else [x * g for x, g in zip(inputs, gradients, strict=True)]
    factors = [float((reduced(inputs, k) / terms[k]).mean()) for k in range(count)]
    expected = sum(factor * term for factor, term in zip(factors, terms, strict=True))
    if not isinstance(expected, Tensor) or not torch.allclose(reduced(inputs), expected, rtol=1e-4, atol=1e-6):
        raise RelevanceError(
            f"rule {name} at {layer} has no per-weight form: its reducer is not a sum of inputs times gradients"
        )
    if flat and not all(bool((modify(inputs[0]) == 1).all()) for modify in hook.input_modifiers):
        raise RelevanceError(f"rule {name} at {layer} has no per-weight form: its reducer leaves the inputs out")
    return Rule(name, layer, hook, tuple(round(factor, 12) for factor in factors), flat, flat or _lives_at_zero(hook))


def _lives_at_zero(hook: BasicHook) -> bool:
    """Whether a modified input is not zero where the input is, or has a shape of its own (the limits of a z-box)."""
    zero = torch.zeros(1, 1)
    try:
        return any(bool(modify(zero).any()) for modify in hook.input_modifiers)
    except RuntimeError:
        return True


def _modified(modifier: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    holder: Any = nn.Module()
    holder.weight = nn.Parameter(weight.detach(), requires_grad=False)
    holder.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    with torch.no_grad(), ParamMod.ensure(modifier)(holder) as modified:
        new_weight, new_bias = modified.weight, modified.bias
    same = new_weight.data_ptr() == weight.data_ptr()
    same_bias = bias is None or new_bias.data_ptr() == bias.data_ptr()
    return weight if same else new_weight.detach(), bias if same_bias else new_bias.detach()
