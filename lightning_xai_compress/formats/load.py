"""Reading a packed file: all of it or nothing, with torch, numpy and constriction alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.layout import CODES, Entry, few, has_memory, is_plain, same, sharing
from lightning_xai_compress.formats.load_file import Decoded, PackedFile, decode, open_packed
from lightning_xai_compress.formats.load_torchao import integer_tensor, torchao_class
from lightning_xai_compress.formats.resizing import resized

__all__ = ["load_compressed"]

_INTEGER_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of weights that torchao tensors stand for

M = TypeVar("M", bound=nn.Module)


@overload
def load_compressed(path: str | Path) -> dict[str, Tensor]: ...
@overload
def load_compressed(path: str | Path, model: None, *, integers: Literal[False] = False) -> dict[str, Tensor]: ...
@overload
def load_compressed(path: str | Path, model: M, *, integers: bool = False) -> M: ...
def load_compressed(
    path: str | Path, model: nn.Module | None = None, *, integers: bool = False
) -> dict[str, Tensor] | nn.Module:
    """Read a packed file, all of it or nothing.

    The tensors are decoded on the CPU before the model is touched: reading takes as much memory as the tensors have,
    and about as much again as their codes take in the file, beside the model itself.

    Args:
        path: The file.
        model: Filled in and returned if given; it must have the very names, shapes and dtypes of the one that was
            saved, before it lost channels if it did: its layers are then made as small.
        integers: Leave the quantized weights of `nn.Linear` layers as integers: they become
            `torchao.quantization.IntxUnpackedToInt8Tensor` (a byte a weight, without gradient), of which `dequantize()`
            gives the weight exactly. A weight stays a float where it is not quantized, has dtype float64, or is shared
            with a layer of another kind, or has a codebook. Needs a model, and torchao.

    Returns:
        The model, or the state dict, in the order of the one saved; tied keys share a tensor.

    Raises:
        FileNotFoundError: No such file.
        ArtifactError: The file is damaged, cut short, of another version, none of ours, or of another model. The model
            is as it was.
        ValueError: `integers` without a model.
        ImportError: `integers` without torchao.
    """
    if integers and model is None:
        raise ValueError(
            "integers=True expected a model whose Linear layers take the integers, got none: "
            "call load_compressed(path, model, integers=True)"
        )
    if integers:
        torchao_class()
    with open_packed(path) as file:
        if model is None:
            made, stored = decode(file), file.stored
            return {name: made[key].values for name, key in stored.items()}
        with resized(model, file.entries, file.provenance):
            _load(path, file, model, integers=integers)
    return model


def _load(path: str | Path, file: PackedFile, model: nn.Module, *, integers: bool) -> None:
    _check_model(path, file.entries, model)
    stored = file.stored
    weights = _linear_weights(file, model) if integers else {}
    _check_plain(path, model, weights)
    made = decode(file, {stored[name] for name in weights})
    state = {name: made[key].values for name, key in stored.items() if name not in weights}
    tensors = {name: _integers(made[stored[name]], module.weight.device) for name, module in weights.items()}
    del made
    _fill(path, model, state)
    _replace(weights, tensors)


def _check_plain(path: str | Path, model: nn.Module, replaced: Collection[str]) -> None:
    """Refuse a model that holds integers where floats are to go."""
    odd = [name for name, tensor in model.state_dict().items() if name not in replaced and not is_plain(tensor)]
    if odd:
        raise ArtifactError(
            f"{path} cannot fill {few(odd)} of this {type(model).__name__}: expected plain tensors, got integers of "
            "an earlier load_compressed(integers=True), or another library's tensors; build the model anew"
        )


def _linear_weights(file: PackedFile, model: nn.Module) -> dict[str, nn.Linear]:
    """Find the Linear layers whose weights can be integers: name of the weight -> layer.

    Tensors stay shared: a group that model or file ties together is taken as a whole or not at all.
    """
    stored = file.stored
    able: dict[str, nn.Linear] = {}
    kinds = {entry.name: entry for entry in file.entries}
    for prefix, module in model.named_modules(remove_duplicate=False):
        name = f"{prefix}.weight".removeprefix(".")
        # The Linear inside of attention is one by name only: attention computes with its weight itself.
        if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
            continue
        if "weight" in module._parameters and name in kinds:
            entry = kinds[stored[name]]
            if entry.kind == CODES and not entry.codebooks and entry.dtype in _INTEGER_DTYPES:
                able[name] = module
    own = model.state_dict()
    in_model = dict(zip(own, sharing(own), strict=True))
    in_file: dict[str, list[str]] = {}
    for name, key in stored.items():
        in_file.setdefault(key, []).append(name)
    whole = [
        names for names in in_file.values() if all(name in able and set(in_model[name]) <= set(names) for name in names)
    ]
    return {name: able[name] for names in whole for name in names}


def _integers(tensor: Decoded, device: torch.device) -> Tensor:
    assert tensor.scales is not None
    assert tensor.widths is not None
    made = integer_tensor(tensor.values, tensor.scales, int(tensor.widths.max()), tensor.entry.dtype)
    return made.to(device) if device != made.device else made


def _replace(weights: Mapping[str, nn.Linear], tensors: Mapping[str, Tensor]) -> None:
    parameters: dict[int, nn.Parameter] = {}
    old = {name: module.weight for name, module in weights.items()}
    for name, module in weights.items():
        parameter = parameters.setdefault(id(old[name]), nn.Parameter(tensors[name], requires_grad=False))
        module.weight = parameter


def _check_model(path: str | Path, entries: Sequence[Entry], model: nn.Module) -> None:
    stored = {entry.name: entry for entry in entries}
    own = model.state_dict()
    unfit = [name for name, tensor in own.items() if not has_memory(tensor)]
    if unfit:
        raise ArtifactError(
            f"{path} cannot fill a model of which these are no tensors with memory of their own: {few(unfit)}; "
            "build it on a real device, run lazy layers once, clone expanded buffers and keep extra state elsewhere"
        )
    both = [name for name in own if name in stored]
    findings = {
        "missing in the file": [name for name in own if name not in stored],
        "unexpected in the file": [name for name in stored if name not in own],
        "of another shape": [
            f"{name} (model {tuple(own[name].shape)}, file {stored[name].shape})"
            for name in both
            if tuple(own[name].shape) != stored[name].shape
        ],
        "of another dtype": [
            f"{name} (model {own[name].dtype}, file {stored[name].dtype})"
            for name in both
            if own[name].dtype != stored[name].dtype
        ],
    }
    text = "; ".join(f"{what}: {few(names)}" for what, names in findings.items() if names)
    if text:
        wrapped = any("_orig_mod." in name for name in (*own, *stored))
        hint = ". torch.compile(layer) puts _orig_mod. into names: wrap the same layers, or use layer.compile()"
        raise ArtifactError(
            f"{path} is of another model than this {type(model).__name__}. Expected the same tensors, got {text}. "
            f"Build the model as it was when it was exported{hint if wrapped else ''}"
        )


def _fill(path: str | Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a model in; what the state lacks stays as it is."""
    own = model.state_dict()
    groups = [[name for name in names if name in state] for names in sharing(own)]
    untied = [names for names in groups if not all(same(state[names[0]], state[name]) for name in names[1:])]
    if untied:
        raise ArtifactError(
            f"{path} holds different values for {few(untied[0])}, which share one tensor in this "
            f"{type(model).__name__}: build the model as it was when it was exported"
        )
    try:
        model.load_state_dict(own, strict=True)  # changes nothing, but meets whatever would refuse
        model.load_state_dict({**own, **state}, strict=True)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} fits, but {type(model).__name__} refuses it in its own loading hooks: {error}; "
            "load the state dict without the model and fill it in by hand"
        ) from error
