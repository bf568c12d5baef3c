"""Whether the smaller module computes what the masked one does: tried with weights drawn for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_xai_compress.sizes import restoring
from lightning_xai_compress.structure.channels import ChannelGroup, channel_mask
from lightning_xai_compress.structure.shrinking import shrunk

__all__ = ["undisturbed", "unlike"]

_SHARE = 1e-3  # of what the channels change, by which the two may differ
_ROUNDING = 84  # machine epsilons of the largest output, 1e-5 in float32
_SEEN = 10  # times the rounding: less of a change says nothing


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """What forward passes inside do to buffers, and what they draw, does not last."""
    with restoring(model, always=True), torch.random.fork_rng():
        made: dict[int, Tensor] = {}  # tied ones stay tied
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = made.setdefault(id(buffer), buffer.clone())
        yield


@torch.no_grad()
def unlike(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    removed: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> str:
    """Why the smaller module does not compute what the masked one does; "" where it does.

    It is tried with weights drawn at random: a model whose head or branches are zero at first would show no mistake.

    Args:
        model: In evaluation mode. It runs, and is left as it was.
        groups, removed: As for `kept_entries`.
        args, kwargs: Of its forward.
    """
    with undisturbed(model):
        _draw(model)
        reason = _compared(model, groups, removed, args, kwargs)
    if reason is not None:
        return reason
    with undisturbed(model):
        reason = _compared(model, groups, removed, args, kwargs)
    return "the model's outputs are not finite, so that nothing can be tried" if reason is None else reason


def _compared(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    removed: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> str | None:
    """As `unlike`; None where numbers are not finite."""
    torch.manual_seed(0)
    whole = _tensors(model(*args, **kwargs))
    with _masked(model, groups, removed):
        torch.manual_seed(0)
        expected = _tensors(model(*args, **kwargs))
    if not all(bool(tensor.isfinite().all()) for tensor in (*whole, *expected)):
        return None
    try:
        with shrunk(model, groups, removed):
            torch.manual_seed(0)
            found = _tensors(model(*args, **kwargs))
    except Exception as error:
        return f"without some of them the model fails: {type(error).__name__}: {str(error)[:200]}"
    seen = False
    for before, one, other in zip(whole, expected, found, strict=True):
        if one.shape != other.shape:
            return f"without some of them the output has shape {tuple(other.shape)} for {tuple(one.shape)}"
        if not one.numel() or not one.is_floating_point():
            continue
        change = float((before - one).abs().max())
        rounding = _ROUNDING * torch.finfo(one.dtype).eps * float(one.abs().max())
        seen |= change > _SEEN * rounding
        difference = float((one - other).abs().max())
        if not difference <= _SHARE * change + rounding:
            return f"without some of them the output differs by {difference:.2g}"
    return "" if seen else "without them no output of the model changes, so that nothing can be tried"


@contextmanager
def _masked(model: nn.Module, groups: Sequence[ChannelGroup], removed: Mapping[str, Tensor]) -> Iterator[None]:
    parts = {part.name for each in groups for part in each.slices}
    weights = {name: each for name, each in model.named_parameters() if name in parts and each.dim() > 1}
    mask = channel_mask(groups, removed, weights)
    with restoring(model, always=True):
        for prefix, module in model.named_modules():
            for leaf in module._parameters:
                name = f"{prefix}.{leaf}".removeprefix(".")
                if name in weights:
                    module._parameters[leaf] = nn.Parameter(weights[name] * mask[name])
        yield


def _draw(model: nn.Module) -> None:
    """Weights that let everything through: none zero, none so small that nobody sees it."""
    draw = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}

    def drawn(tensor: Tensor) -> Tensor:
        values = torch.rand(tensor.shape, generator=draw) + 0.5
        if tensor.dim() > 1 and tensor.numel():
            spread = math.sqrt(2 * len(tensor) / tensor.numel())
            values = torch.randn(tensor.shape, generator=draw) * spread
        return values.to(tensor)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(drawn(parameter.detach()), requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(drawn(module.running_mean) - 1)
            module.running_var.copy_(drawn(module.running_var))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for member in members for tensor in _tensors(member)]
