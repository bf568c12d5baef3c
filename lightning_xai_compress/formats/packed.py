"""The format "safetensors": one small file that gives every tensor of a state dict back bit for bit.

It is a plain safetensors file of three tensors (docs/packed-format.md has every byte):

- `stream`, uint32: the integer codes of all quantized weights, the contexts (bit width and table) and scales of their
  rows, and one bit a weight of what is pruned but not quantized, in one ANS stream (`entropy`, `contexts`);
- `rest`, uint8: all else, in byte planes, each deflated where that pays; floats that float16 holds take two bytes;
- `index`, uint8: a deflated JSON object with names, shapes, dtypes, aliases, what was skipped, and where it comes from.

The metadata holds the format's name, its version and a SHA-256 over the whole file. Negative zeros of a
quantized or pruned weight come back as zeros (they compare equal); all else, NaN included, comes back bit for bit.

`load_compressed` needs torch, numpy and constriction alone.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import container, entropy
from lightning_xai_compress.formats.container import VERSIONS
from lightning_xai_compress.formats.layout import Entry, check_unfolded, chunks, few, same, write_codebook
from lightning_xai_compress.formats.load import load_compressed
from lightning_xai_compress.formats.packed_model import split
from lightning_xai_compress.formats.packed_planes import PlaneWriter
from lightning_xai_compress.formats.packed_read import read_packed
from lightning_xai_compress.formats.registry import Files, Format, Inputs, register
from lightning_xai_compress.plan import CompressionPlan

__all__ = [
    "VERSIONS",
    "PackedSize",
    "check_packed",
    "code_entropy",
    "load_compressed",
    "pack",
    "packed_size",
    "read_packed",
    "write_packed",
]

_LIBRARIES = ("lightning-xai-compress", "torch")


@dataclass(frozen=True)
class PackedSize:
    """Where the bytes of a packed file go.

    Args:
        total: Bytes of the file; payload, scales, rest and metadata add up to it.
        payload: Codes, tables, bit widths and contexts of rows, and the bitmaps of pruned floats.
        scales: Scales of the rows.
        rest: All that is not quantized: biases, buffers, layers left alone, floats that pruning kept.
        metadata: Names, shapes, where it comes from, and what a safetensors file begins with.
        layers: Bytes of each quantized or pruned parameter by name: its share of the three parts above, rounded.
    """

    total: int
    payload: int
    scales: int
    rest: int
    metadata: int
    layers: Mapping[str, int]


def write_packed(
    model: nn.Module, plan: CompressionPlan, path: Path, examples: Sequence[Inputs] = (), files: Files | None = None
) -> None:
    """Write a model as one packed file.

    Args:
        model: Its parameters hold the masked, quantized values that `plan` describes.
        plan: What was decided.
        path: The file.
        examples: Not used.
        files: Not used.

    Raises:
        ArtifactError: Model and plan do not fit each other.
    """
    path.write_bytes(pack(model, plan))


def check_packed(path: Path, model: nn.Module, examples: Sequence[Inputs] = (), files: Files | None = None) -> float:
    """Prove that a file gives all tensors of the state dict back.

    Returns:
        The largest absolute difference: 0.0.

    Raises:
        ArtifactError: It does not.
    """
    state, loaded = model.state_dict(), load_compressed(path)
    wrong = [name for name in {**state, **loaded} if not same(state.get(name), loaded.get(name))]
    if wrong:
        raise ArtifactError(f"{path} does not give these tensors back exactly: {few(wrong)}; please report this")
    return 0.0


def pack(model: nn.Module, plan: CompressionPlan) -> bytes:
    """Turn a model into the bytes of a packed file; the same model, plan and library versions give the same bytes.

    Raises:
        ArtifactError: A weight is no multiple of its scale, exceeds its bit width or is not zero where the mask says
            so; plan and model name different parameters; the state dict holds what is not a dense tensor, a name
            like a path, or nearly nothing but zeros in a place that no reader would unfold.
    """
    return _pack(model, plan)[0]


def packed_size(model: nn.Module, plan: CompressionPlan) -> PackedSize:
    """Tell how large the packed file of a model is, and where its bytes go.

    The parts within the stream are estimated: the information of each symbol, scaled to the true size of the stream.

    Raises:
        ArtifactError: As `pack` does.
    """
    return _pack(model, plan)[1]


def code_entropy(model: nn.Module, plan: CompressionPlan) -> float:
    """Bytes that the codes of a model have by the zeroth-order entropy of each tensor: what `payload` compares with.

    For a tensor that is pruned but not quantized, those of its bitmap.

    Raises:
        ArtifactError: As `pack` does.
    """
    bits = 0.0
    for block in split(model, plan).blocks:
        counts = np.bincount(block.values.reshape(-1).view(np.uint8), minlength=256)
        counts = counts[counts > 0]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return bits / 8


def _pack(model: nn.Module, plan: CompressionPlan) -> tuple[bytes, PackedSize]:
    parts = split(model, plan)
    encoded = entropy.encode(parts.blocks)
    planes = PlaneWriter()
    kept: dict[str, float] = {}
    counts = [(entry, len(parts.numbers[entry.name])) for entry in parts.entries if entry.raw]
    for _, chunk in chunks(counts):
        numbers = np.concatenate([parts.numbers[entry.name][start:end] for entry, start, end in chunk])
        size = planes.write(numbers)
        for entry, start, end in chunk:
            kept[entry.name] = kept.get(entry.name, 0.0) + size * (end - start) / len(numbers)
    rest = planes.finish()
    index = {
        "tensors": [_row(entry) for entry in parts.entries],
        "contexts": encoded.header.contexts,
        "scales": encoded.header.scales,
        "planes": planes.lengths,
        "skipped": [[skipped.name, skipped.reason] for skipped in plan.skipped],
        "provenance": {key: plan.provenance[key] for key in sorted(plan.provenance)},
        "versions": _versions(),
    }
    version = 2 if any(entry.groups > 1 for entry in parts.entries) else 1
    version = 3 if any(entry.codebooks for entry in parts.entries) else version
    data = container.write_container(
        {"stream": encoded.words, "rest": rest, "index": container.write_json(index)}, version=version
    )
    check_unfolded(parts.entries, len(data), "the model")

    bits = sum(encoded.code_bits) + sum(encoded.scale_bits)
    byte = encoded.words.nbytes / bits if bits else 0.0
    layers = {
        entry.name: round(byte * (code + scale) + kept.get(entry.name, 0.0))
        for entry, code, scale in zip(parts.coded, encoded.code_bits, encoded.scale_bits, strict=True)
    }
    scales = round(byte * sum(encoded.scale_bits))
    metadata = len(data) - encoded.words.nbytes - rest.nbytes
    return data, PackedSize(len(data), encoded.words.nbytes - scales, scales, rest.nbytes, metadata, layers)


def _row(entry: Entry) -> list[Any]:
    if entry.alias is not None:
        return [entry.name, entry.alias]
    row = [entry.name, str(entry.dtype).removeprefix("torch."), entry.shape, entry.kind]
    if entry.codebooks:
        texts = [write_codebook(each) for each in entry.codebooks]
        return [*row, texts if len(texts) > 1 else texts[0]]
    if entry.groups > 1:
        return [*row, entry.groups]
    return [*row, "float16"] if entry.half else row


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


register(Format("safetensors", "model.safetensors", write=write_packed, check=check_packed, read=read_packed))
