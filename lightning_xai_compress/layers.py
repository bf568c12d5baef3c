"""Which parameters of a model are compressible, found by name; what is left out is named with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from lightning_xai_compress.errors import CompressionError
from lightning_xai_compress.plan import Skipped

__all__ = ["COMPRESSIBLE_TYPES", "Layers", "find_layers", "find_scorable", "tensor_places"]

COMPRESSIBLE_TYPES = (
    *(nn.Linear, nn.Embedding),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Layers:
    """The compressible parameters of a model, and what was left out.

    Args:
        names: Parameter names such as "net.0.weight", sorted; a tied weight once, under its first name.
        skipped: Layers with weights that are not compressed, each with the reason.
    """

    names: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def find_layers(model: nn.Module, *, exclude: Sequence[str] = ()) -> Layers:
    """Find the weights of Linear, Embedding, convolutions (transposed, too) and attention's input projections.

    "Channels" are the rows of a weight, along its first axis: output channels, tokens of an embedding, and input
    channels of a transposed convolution.

    Args:
        model: Any module.
        exclude: Shell-style patterns ("head*", "*.downsample.*") matched against layer and parameter names.

    Raises:
        TypeError: No module.
        ValueError: A pattern that matches no layer.
        CompressionError: Nothing is left to compress.
    """
    _check_module(model)
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    matched: set[str] = set()
    names: set[str] = set()
    reasons: dict[str, str] = {}
    left_alone: set[int] = set()  # a tied weight is left alone under all of its names
    for layer, module in model.named_modules():
        reason = _why_not(module)
        if reason is None:
            continue
        label = layer or type(module).__name__
        held = dict(module._parameters)
        weights = [each for each in map(held.get, _weight_keys(module)) if each is not None]
        own = [first_name[id(each)] for each in weights] or [f"{layer}.weight".lstrip(".")]
        members = [each for each in module._parameters.values() if each is not None]
        hits = {pattern for pattern in exclude if any(fnmatchcase(name, pattern) for name in (layer, *own))}
        matched |= hits
        if hits:
            reasons.setdefault(label, f"excluded by {sorted(hits)[0]!r}")
            left_alone.update(map(id, members))
        elif reason:
            reasons.setdefault(label, reason)
            left_alone.update(map(id, members))
        else:
            names.update(own)
    unmatched = [pattern for pattern in exclude if pattern not in matched]
    if unmatched:
        candidates = ", ".join(sorted(names)[:8])
        raise ValueError(f"exclude={unmatched} matches no layer; names look like: {candidates}")
    parameters = dict(model.named_parameters())
    for name in sorted(names):
        if id(parameters[name]) in left_alone:
            names.discard(name)
            reasons.setdefault(name.rpartition(".")[0] or name, "its weight is tied to a layer that is left alone")
    if not names:
        left_out = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it has no such layers"
        raise CompressionError(
            f"{type(model).__name__} has nothing to compress: expected at least one Linear, convolution, Embedding "
            f"or attention layer "
            f"({left_out})"
        )
    return Layers(tuple(sorted(names)), tuple(Skipped(name, reason) for name, reason in sorted(reasons.items())))


def find_scorable(model: nn.Module) -> Layers:
    """Find the weights whose relevance can be asked for, a superset of the compressible ones.

    Those of `find_layers`, of embeddings that cannot be compressed, and weights masked by `torch.nn.utils.prune` under
    their name `..._orig`. `skipped` names the layers that have others.

    Raises:
        TypeError: No module.
    """
    _check_module(model)
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    names: set[str] = set()
    reasons: dict[str, str] = {}
    for layer, module in model.named_modules():
        found = [module._parameters.get(key) for key in _weight_keys(module)]
        weights = [each for each in found if each is not None]
        usable = [each for each in weights if _is_usable(each)]
        names |= {first_name[id(each)] for each in usable}
        if usable:
            continue
        if weights:
            reasons[layer or type(module).__name__] = "lazy, or not real floating point: not scored"
        elif isinstance(module, _RECURRENT):
            reasons[layer or type(module).__name__] = "recurrent layer: not scored"
        elif isinstance(module, COMPRESSIBLE_TYPES):
            reasons[layer or type(module).__name__] = "its weight is parametrized: not scored"
        elif any(each is not None and each.dim() >= 2 for each in module._parameters.values()):
            reasons[layer or type(module).__name__] = f"{type(module).__name__} holds weights of its own: not scored"
    return Layers(tuple(sorted(names)), tuple(Skipped(name, reason) for name, reason in sorted(reasons.items())))


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got a {type(model).__name__}")


def _weight_keys(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION_WEIGHTS
    return ("weight", "weight_orig") if isinstance(module, COMPRESSIBLE_TYPES) else ()


def _is_usable(weight: torch.Tensor) -> bool:
    lazy = isinstance(weight, nn.parameter.UninitializedParameter)
    return not lazy and weight.is_floating_point()


def tensor_places(model: nn.Module) -> dict[str, str]:
    """Every place of a parameter or buffer, once, with the first name of the tensor that is there.

    For `functional_call(..., tie_weights=False)`: a tied tensor has several places, but a module that is registered
    twice has its places once. Swapping one place twice, as `tie_weights=True` does there, puts the wrong tensor back.
    """
    first: dict[int, str] = {}
    places: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                place = f"{prefix}.{name}" if prefix else name
                places[place] = first.setdefault(id(tensor), place)
    return places


def _why_not(module: nn.Module) -> str | None:
    """Say "" for a compressible layer, a reason for one with weights that is not, None for what has no weights."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted by torch.jit: neither scored nor quantized" if [*module.parameters(recurse=False)] else None
    if isinstance(module, _RECURRENT):
        return "recurrent layer: neither scored nor quantized"
    if isinstance(module, nn.Embedding) and module.sparse:
        return "embedding with sparse gradients: not compressed"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "embedding with max_norm, which writes to its weight in forward: not compressed"
    if not isinstance(module, (*COMPRESSIBLE_TYPES, nn.MultiheadAttention)):
        own = [parameter for parameter in module._parameters.values() if parameter is not None and parameter.dim() >= 2]
        return f"{type(module).__name__} holds weights of its own: neither scored nor quantized" if own else None
    found = [module._parameters.get(key) for key in _weight_keys(module) if key != "weight_orig"]
    parameter = next((each for each in found if each is not None), None)
    if parameter is None:
        return (
            "its weight is parametrized or masked by torch.nn.utils: make that permanent first "
            "(prune.remove or parametrize.remove_parametrizations)"
        )
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "lazy layer that has not seen a batch yet"
    if not torch.is_floating_point(parameter) or parameter.is_complex():
        return f"its weight is {parameter.dtype}, not real floating point"
    return ""
