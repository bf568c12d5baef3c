"""The layers of a forward pass as the engine meets them, and what reaches their weights in the backward pass.

On its own, `Interception` passes the ordinary gradient, which is what gradient-based criteria go by; `lrp.LRP` adds
what LRP does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_xai_compress.errors import NonFiniteError, RelevanceError
from lightning_xai_compress.relevance.attention import AttentionRule, multi_head_attention
from lightning_xai_compress.relevance.operations import LINEAR_FUNCTIONS, Operation, operation
from lightning_xai_compress.relevance.propagation import depends_on, is_copy
from lightning_xai_compress.relevance.rules import Rule, RuledOutput
from lightning_xai_compress.relevance.shares import add_shares, add_squares, input_relevance, input_shares
from lightning_xai_compress.relevance.statistics import RelevanceSums

__all__ = ["BATCH_NORM", "Interception", "Settings", "without_autocast"]

BATCH_NORM = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

_Parameters = tuple[Tensor, Tensor | None]
_Call = tuple[Operation, Tensor, Tensor, Tensor | None, Rule]  # of: layer, input, weight, bias, rule


@dataclass(frozen=True)
class Settings:
    """How relevance is propagated.

    Args:
        epsilon: Stabiliser of layers without another rule, >= 0.
        rules: Rule by parameter name, where it is not epsilon.
        attention: See `attention.attend`; None for the ordinary gradient.
    """

    epsilon: float = 1e-6
    rules: Mapping[str, Rule] = field(default_factory=dict)
    attention: AttentionRule | None = "attnlrp"
    plain: bool = False


@dataclass
class _Output:
    """What is remembered of the output of a layer until the end of its batch."""

    tensor: Tensor
    kept: _Kept | None
    name: str
    channels: int  # axis of the weight that belongs to the channels of the output; -1: none
    call: _Call | None = None

    def __post_init__(self) -> None:
        self._version = self.tensor._version

    def is_still(self, tensor: Tensor) -> bool:
        """Whether a tensor is this output, and nothing was written into it."""
        return tensor is self.tensor and tensor._version == self._version


class _Kept:
    """The values of a tensor at the time of the call, though later operations may write into it."""

    def __init__(self, tensor: Tensor, input: Tensor, recompute: Callable[[], Tensor], label: str) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version
        self._input, self._input_version = input, input._version
        self._recompute = recompute
        self._label = label

    def allow(self) -> None:
        """Take the values as they are now: where a ReLU put zeros, no relevance arrives anyway."""
        self._version = self._tensor._version

    def value(self) -> Tensor:
        if self._tensor._version == self._version:
            return self._tensor
        if self._input._version != self._input_version:
            raise RelevanceError(f"{self._label}: its input is modified in place after the call")
        with torch.no_grad():
            return self._recompute()


class Interception(TorchFunctionMode):
    """Meets the operations of a forward pass and collects what reaches the weights in the backward pass.

    Args:
        leaves: All parameters of the pass, by name, as the tensors that the model sees.
        sums: Where the shares of the scored weights go.
        settings: How relevance is propagated; by default the ordinary gradient is.
    """

    handlers: ClassVar[dict[Any, str]] = {
        **dict.fromkeys(LINEAR_FUNCTIONS, "_layer"),
        F.embedding: "_embedding",
        F.batch_norm: "_batch_norm",
        F.multi_head_attention_forward: "_multi_head_attention",
    }

    def __init__(self, leaves: Mapping[str, Tensor], sums: RelevanceSums, settings: Settings | None = None) -> None:
        super().__init__()
        self.sums = sums
        self.settings = settings or Settings(epsilon=0.0, attention=None)
        self.diagnose = False
        self.token_ids: Tensor | None = None
        self.tokens: Tensor | None = None
        self.inputs: list[Tensor] = []  # what heat maps are of
        self.input_relevance: Tensor | None = None  # R of inputs that may be zero, where it is not x c
        self.draws = False  # whether the relevance of the input is asked for
        self._leaves = dict(leaves)
        self._trainable = [leaf for leaf in leaves.values() if leaf.requires_grad]
        self._names = {id(leaf): (name, slice(None)) for name, leaf in leaves.items()}
        self._parts: list[Tensor] = []
        self._outputs: dict[int, _Output] = {}

    def end_forward(self) -> None:
        """Forget the outputs of layers: what the backward pass needs, its hooks hold."""
        self._outputs.clear()

    def end_batch(self) -> None:
        """Forget the tensors of this batch."""
        for part in self._parts:
            del self._names[id(part)]
        self._parts.clear()
        self._outputs.clear()
        self.token_ids = self.tokens = None
        self.inputs = []
        self.input_relevance = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = self.handlers.get(func)
        handler = _ordinary if name is None else getattr(self, name)
        return without_autocast(handler, func, *args, **kwargs)

    def _layer(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        name, rows = self._identify(weight)
        rule = self.settings.rules.get(name)
        call = operation(func, weight, args, kwargs)
        plain_input, plain_weight = input.detach(), weight.detach()
        plain_bias = None if bias is None else bias.detach()

        def compute() -> Tensor:
            return _no_view(func(plain_input, plain_weight, plain_bias, *args, **kwargs))

        z: Tensor
        if rule is not None and (input.requires_grad or weight.requires_grad):
            of = (call, input, weight, plain_bias, rule)
            z, kept = self._ruled(of, compute, name, rows)
        else:
            of, kept = None, None
            z = _no_view(func(input, weight, bias, *args, **kwargs))
        if self.diagnose and not torch.isfinite(z.detach()).all():
            raise NonFiniteError(f"the output of {name or func.__name__} is not finite")
        if not z.requires_grad:
            return z
        if of is None:
            epsilon = self.settings.epsilon
            kept = _Kept(z, plain_input, compute, name) if epsilon else None
            z.register_hook(self._hook(call, kept, epsilon, plain_input, plain_weight, name, rows))
        channels = -1  # no axis of the output is one of the weight
        if call.spatial or z.dim() == 2:
            channels = 0 if not call.transposed else 1 if call.settings["groups"] == 1 else -1
        self._outputs[id(z)] = _Output(z, kept, name, channels, of)
        return z

    def _identify(self, weight: Tensor) -> tuple[str, slice]:
        """The name of a weight, or of what it is a masked copy of (`torch.nn.utils.prune`); "" if it has none."""
        known = self._names.get(id(weight))
        if known is not None or weight.grad_fn is None:
            return known or ("", slice(None))
        sources = [node for node, _ in weight.grad_fn.next_functions if node is not None]
        leaf: Any = getattr(sources[0], "variable", None) if len(sources) == 1 else None
        name, rows = self._names.get(id(leaf), ("", slice(None)))
        if not name or leaf.shape != weight.shape or not torch.equal(leaf, weight):
            return "", slice(None)
        return name, rows

    def _rows(self, weight: Tensor, rows: slice) -> Tensor:
        """Some rows of a weight, known under its name."""
        part = weight[rows]
        name, _ = self._identify(weight)
        if name:
            self._names[id(part)] = (name, rows)
            self._parts.append(part)
        return part

    def _hook(
        self, call: Operation, kept: _Kept | None, epsilon: float, input: Tensor, weight: Tensor, name: str, rows: slice
    ) -> Callable[[Tensor], Tensor]:
        # what the hook holds must not lead back to the graph that holds the hook: that would never be freed
        scored = name in self.sums.weights
        exact_zeros_are_unknown = self.settings.attention == "cp"

        held = [(input, kept)]

        def backward(gradient: Tensor) -> Tensor:
            input, kept = held.pop()  # called once; what it held can go
            if kept is not None:
                share = kept.value().abs().add_(epsilon)  # gradient * |z| / (|z| + epsilon), in place
                gradient = torch.addcdiv(gradient, gradient, share, value=-epsilon, out=share)
            if scored:
                self._reached(name, rows, gradient if exact_zeros_are_unknown else None, call.spatial)
                add_squares(self.sums, name, rows, call, input, weight, gradient)
            return gradient

        del input, kept

        return backward

    def _reached(self, name: str, rows: slice, gradient: Tensor | None, spatial: int) -> None:
        if gradient is None or spatial:
            self.sums.seen[name][rows] = True
        else:  # queries and keys in one layer with the values get exact zeros
            self.sums.seen[name][rows] |= gradient.reshape(-1, gradient.shape[-1]).any(0)

    def _ruled(
        self, of: _Call, compute: Callable[[], Tensor], name: str, rows: slice, merged: _Parameters | None = None
    ) -> tuple[Tensor, _Kept]:
        """The output of a layer with another rule, perhaps with a BatchNorm merged in."""
        call, input, weight, bias, rule = of
        plain_input, plain_weight = input.detach(), weight.detach()
        used = (plain_weight, bias) if merged is None else merged
        # zeros have no R / x to pass on: R itself goes to the input of the model, past nothing but copies
        from_input = rule.input_bound and is_copy(input)
        needed = input.requires_grad and (self.draws or depends_on(input, self._trainable))
        kept: list[_Kept] = []

        def backward(gradient: Tensor, needs_input: bool) -> Tensor | None:
            value = kept[0].value()
            parts = rule.parts(call, plain_input, *used, value, value * gradient)
            if name in self.sums.weights:
                self._reached(name, rows, None, call.spatial)
                add_shares(self.sums, name, rows, call, plain_weight, parts, rule)
            if not needs_input or not needed:
                return None
            if not rule.input_bound:
                return input_shares(call, plain_input, parts)
            if not from_input:
                raise RelevanceError(
                    f"rule {rule.name} at {rule.layer} gives relevance to inputs that are zero, so it can only stand "
                    "at the input of the model (normalized outside of it): use it for the first layer, as "
                    "SpecialFirstLayerMapComposite does"
                )
            relevance = input_relevance(call, plain_input, parts, rule)
            for leaf in self.inputs:  # past the copies now, for other layers pass R / x to the same input
                (found,) = torch.autograd.grad(input, leaf, relevance, retain_graph=True)
                self.input_relevance = found if self.input_relevance is None else self.input_relevance + found
            return torch.zeros_like(plain_input)

        z: Tensor = RuledOutput.apply(input, weight, compute, backward)
        kept.append(_Kept(z, plain_input, compute, name))
        return z, kept[0]

    def _batch_norm(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        settings = dict(zip(BATCH_NORM, args, strict=False)) | kwargs
        mean, variance = settings.get("running_mean"), settings.get("running_var")
        if settings.get("training") or mean is None or variance is None:
            return self._batch_statistics(func, input, *args, **kwargs)
        known = self._outputs.get(id(input))
        y: Tensor
        if known is None or known.channels < 0 or not known.is_still(input):
            y = func(input, *args, **kwargs)
            return y
        factor = (variance.detach() + settings.get("eps", 1e-5)).rsqrt()
        if settings.get("weight") is not None:
            factor = factor * settings["weight"].detach()
        weight = self._leaves.get(known.name)
        if weight is not None:
            shape = [1] * weight.dim()
            shape[known.channels] = -1
            fold, other = factor.abs().view(shape), self.sums.folded.get(known.name)
            self.sums.folded[known.name] = fold if other is None else torch.maximum(fold, other)
        if known.call is None or weight is None:
            y = func(input, *args, **kwargs)
            return y
        # every rule but the plain epsilon sees layer and norm as one layer
        bias = known.call[3]
        shift = (-mean.detach() if bias is None else bias - mean.detach()) * factor
        if settings.get("bias") is not None:
            shift = shift + settings["bias"].detach()
        plain = input.detach()
        y, kept = self._ruled(
            known.call,
            lambda: func(plain, *args, **kwargs),
            known.name,
            self._identify(known.call[2])[1],
            (known.call[2].detach() * factor.view(shape), shift),
        )
        self._outputs[id(y)] = _Output(y, kept, known.name, -1)
        return y

    def _batch_statistics(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """BatchNorm that takes its statistics from the batch."""
        y: Tensor = func(input, *args, **kwargs)
        return y

    def _embedding(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        # the settings that change the gradient alone are left out: relevance is that of every occurrence
        output: Tensor = func(input, weight, None, max_norm, norm_type)
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:  # what comes from the input is an activation, whichever layers are scored
            output = output.requires_grad_().clone()
        name, _ = self._identify(weight)
        if self.tokens is None:
            self.token_ids, self.tokens = input, output

        def backward(gradient: Tensor) -> None:
            indices, flat = input.reshape(-1), gradient.reshape(-1, gradient.shape[-1])
            self.sums.seen[name][indices[flat.any(1)]] = True
            if self.sums.collects("absolute"):
                self.sums.sums["absolute"][name].index_add_(0, indices, flat.abs())
            if not self.sums.collects("square"):
                return
            for tokens, shares in zip(input.split(1), gradient.split(1), strict=True) if by_sample else ():
                indices, inverse = tokens.unique(return_inverse=True)
                total = flat.new_zeros(len(indices), flat.shape[1])
                total.index_add_(0, inverse.reshape(-1), shares.reshape(-1, flat.shape[1]))
                self.sums.sums["square"][name].index_add_(0, indices, total.square_())
            if not by_sample:
                self.sums.sums["square"][name].index_add_(0, indices, flat.square())

        by_sample = self.sums.by_sample and input.dim() > 1
        if name in self.sums.weights:
            output.register_hook(backward)
        return output

    def _multi_head_attention(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._layer(F.linear, input, weight, bias)

        return multi_head_attention(linear, self._rows, self.settings.attention, *args, **kwargs)


def without_autocast(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function as if the model had not switched autocast on by itself."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        device = next((each.device.type for each in args if isinstance(each, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)
    return function(*args, **kwargs)


def _ordinary(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _no_view(z: Tensor) -> Tensor:
    """The same tensor: what is written into a view (F.linear may give one) would pass by the hooks of the view."""
    if not z._is_view():
        return z
    same: Tensor = torch.ops.aten._unsafe_view(z, z.shape)
    return same
