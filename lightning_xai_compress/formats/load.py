"""Reading a packed file: all of it or nothing, with torch, numpy, safetensors and constriction alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import container, entropy
from lightning_xai_compress.formats.layout import (
    BITMAP,
    CODE_DTYPES,
    CODES,
    DTYPES,
    RAW,
    Entry,
    check_unfolded,
    few,
    gather,
    raw_bytes,
    same,
    sharing,
)

__all__ = ["load_compressed"]

_BAD_BYTES = (
    *(ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError, MemoryError),
    *(zlib.error, SafetensorError),
)

M = TypeVar("M", bound=nn.Module)


@overload
def load_compressed(path: str | Path) -> dict[str, Tensor]: ...
@overload
def load_compressed(path: str | Path, model: M) -> M: ...
def load_compressed(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor] | nn.Module:
    """Read a packed file, all of it or nothing.

    Args:
        path: The file.
        model: Filled in and returned if given; it must have the very names, shapes and dtypes of the one that was
            saved. The tensors are decoded on the CPU, one at a time, before the model is touched.

    Returns:
        The model, or the state dict, in the order of the one saved; tied keys share a tensor.

    Raises:
        FileNotFoundError: No such file.
        ArtifactError: The file is damaged, cut short, of another version, none of ours, or of another model. The model
            is as it was.
    """
    data = Path(path).read_bytes()
    parts = container.read_container(data, str(path))
    size = len(data)
    del data
    try:
        index = container.read_json(parts["index"])
        entries = _read_entries(index["tensors"])
    except _BAD_BYTES as error:
        raise _inconsistent(path, error) from error
    check_unfolded(entries, size, str(path))
    if model is not None:
        _check_model(path, entries, model)
    try:
        state = _decode(parts, index, entries)
    except _BAD_BYTES as error:
        raise _inconsistent(path, error) from error
    return state if model is None else _fill(path, model, state)


def _decode(parts: Mapping[str, NDArray[Any]], index: dict[str, Any], entries: Sequence[Entry]) -> dict[str, Tensor]:
    first, count = index["scales"]
    header = entropy.Header(
        tuple((int(width), int(mode)) for width, mode in index["contexts"]), (int(first), int(count))
    )
    in_stream = [entry for entry in entries if entry.kind != RAW]
    made: dict[str, Tensor] = {}
    bitmaps: dict[str, NDArray[np.bool_]] = {}
    blocks = entropy.decode(parts["stream"], header, [entry.block for entry in in_stream])
    for entry, block in zip(in_stream, blocks, strict=True):
        if block.scales is None:
            bitmaps[entry.name] = block.values.reshape(-1) != 0
            continue
        scale = torch.from_numpy(block.scales.view(np.int16)).view(torch.bfloat16).float()
        weight = torch.from_numpy(block.values).float().mul_(scale[:, None])
        made[entry.name] = weight.to(entry.dtype).reshape(entry.shape)
    counts = [
        (entry, int(bitmaps[entry.name].sum()) if entry.kind == BITMAP else entry.numel)
        for entry in entries
        if entry.raw
    ]
    chunks = gather(counts)
    sizes = [(chunk[0][0].dtype.itemsize, sum(count for _, count in chunk)) for chunk in chunks]
    planes = container.join_planes(parts["rest"], index["planes"], sizes)
    for chunk, numbers in zip(chunks, planes, strict=True):
        start = 0
        for entry, count in chunk:
            end = start + count * entry.dtype.itemsize
            values = numbers[start:end].reshape(count, entry.dtype.itemsize)
            start = end
            if entry.kind == BITMAP:
                full = np.zeros((entry.numel, entry.dtype.itemsize), np.uint8)
                full[bitmaps[entry.name]] = values
                values = full
            flat = torch.empty(entry.numel, dtype=entry.dtype)
            raw_bytes(flat)[:] = values
            made[entry.name] = flat.reshape(entry.shape)
    return {entry.name: made[entry.name if entry.alias is None else entries[entry.alias].name] for entry in entries}


def _read_entries(rows: list[list[Any]]) -> list[Entry]:
    entries: list[Entry] = []
    for row in rows:
        if len(row) == 2:
            name, alias = row
            if not 0 <= alias < len(entries) or entries[alias].alias is not None:
                raise ValueError(f"{name} is an alias of nothing")
            first = entries[alias]
            entries.append(Entry(name, first.dtype, first.shape, alias=alias))
        else:
            name, dtype, shape, kind = row
            if any(type(length) is not int or length < 0 for length in shape) or kind not in (RAW, CODES, BITMAP):
                raise ValueError(f"{name} has shape {shape} and kind {kind}")
            entries.append(Entry(name, DTYPES[dtype], tuple(shape), kind))
            if kind != RAW and not entries[-1].numel:
                raise ValueError(f"{name} of shape {shape} cannot be coded")
            if kind == CODES and entries[-1].dtype not in CODE_DTYPES:
                raise ValueError(f"{name} of {dtype} cannot be coded")
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError("names that are no text, or not unique")
    return entries


def _check_model(path: str | Path, entries: Sequence[Entry], model: nn.Module) -> None:
    stored = {entry.name: entry for entry in entries}
    own = model.state_dict()
    unfit = [name for name, tensor in own.items() if not _has_memory(tensor)]
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
        raise ArtifactError(
            f"{path} is of another model than this {type(model).__name__}. Expected the same tensors, got {text}. "
            "Build the model as it was when it was exported"
        )


def _has_memory(tensor: object) -> bool:
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return False
    return not any(step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True))


def _fill(path: str | Path, model: M, state: dict[str, Tensor]) -> M:
    own = model.state_dict()
    untied = [names for names in sharing(own) if not all(same(state[names[0]], state[name]) for name in names[1:])]
    if untied:
        raise ArtifactError(
            f"{path} holds different values for {few(untied[0])}, which share one tensor in this "
            f"{type(model).__name__}: build the model as it was when it was exported"
        )
    try:
        model.load_state_dict(own, strict=True)  # changes nothing, but meets whatever would refuse
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} fits, but {type(model).__name__} refuses it in its own loading hooks: {error}; "
            "load the state dict without the model and fill it in by hand"
        ) from error
    return model


def _inconsistent(path: str | Path, error: Exception) -> ArtifactError:
    what = f"{type(error).__name__}: {error}"[:200]
    return ArtifactError(
        f"{path} is damaged: expected an index and a stream that agree, got {what}; copy it again, or export it again"
    )
