"""The format "safetensors": one small file that gives every tensor of a state dict back bit for bit.

It is a plain safetensors file of three tensors (docs/packed-format.md has every byte):

- `stream`, uint32: the integer codes of all quantized weights, the contexts (bit width and table) and scales of their
  channels, and one bit a weight of what is pruned but not quantized, in one ANS stream (`entropy`, `contexts`);
- `rest`, uint8: all else, in byte planes, each deflated where that pays;
- `index`, uint8: a deflated JSON object with names, shapes, dtypes, aliases and what was skipped.

The metadata holds the format's name, its version and a SHA-256 over the whole file. Negative zeros of a
quantized or pruned weight come back as zeros (they compare equal); all else, NaN included, comes back bit for bit.

`load_compressed` needs torch, numpy, safetensors and constriction alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import container, entropy
from lightning_xai_compress.formats.container import VERSION
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
from lightning_xai_compress.formats.load import load_compressed
from lightning_xai_compress.formats.registry import Contents, Files, Format, Inputs, check_plan, register
from lightning_xai_compress.plan import CompressionPlan

__all__ = [
    "VERSION",
    "PackedSize",
    "check_packed",
    "load_compressed",
    "pack",
    "packed_size",
    "read_packed",
    "write_packed",
]


@dataclass(frozen=True)
class PackedSize:
    """Where the bytes of a packed file go.

    Args:
        total: Bytes of the file; payload, scales, rest and metadata add up to it.
        payload: Codes, tables, bit widths and contexts of channels, and the bitmaps of pruned floats.
        scales: Scales of the channels.
        rest: All that is not quantized: biases, buffers, layers left alone, floats that pruning kept.
        metadata: Names, shapes, and what a safetensors file begins with.
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


def read_packed(path: Path) -> Contents:
    """Tell what a file holds."""
    raise NotImplementedError


def pack(model: nn.Module, plan: CompressionPlan) -> bytes:
    """Turn a model into the bytes of a packed file; the same model and plan give the same bytes.

    Raises:
        ArtifactError: A weight is no multiple of its scale, exceeds its bit width or is not zero where the mask says
            so; plan and model name different parameters; or the state dict holds what is not a dense tensor.
    """
    return _pack(model, plan)[0]


def packed_size(model: nn.Module, plan: CompressionPlan) -> PackedSize:
    """Tell how large the packed file of a model is, and where its bytes go.

    The parts within the stream are estimated: the information of each symbol, scaled to the true size of the stream.

    Raises:
        ArtifactError: As `pack` does.
    """
    return _pack(model, plan)[1]


def _pack(model: nn.Module, plan: CompressionPlan) -> tuple[bytes, PackedSize]:
    entries, tensors, blocks = _split(model, plan)
    in_stream = [entry for entry in entries if entry.kind != RAW]
    encoded = entropy.encode(blocks)
    values = {entry.name: raw_bytes(tensors[entry.name]) for entry in entries if entry.raw}
    for entry, block in zip(in_stream, blocks, strict=True):
        if entry.kind == BITMAP:
            values[entry.name] = values[entry.name][block.values.reshape(-1) != 0]
    chunks = gather([(entry, len(values[entry.name])) for entry in entries if entry.raw])
    stacked = [np.concatenate([values[entry.name].reshape(-1) for entry, _ in chunk]) for chunk in chunks]
    rest, planes, sizes = container.split_planes(
        [(chunk[0][0].dtype.itemsize, numbers) for chunk, numbers in zip(chunks, stacked, strict=True)]
    )
    index = {
        "tensors": [
            [entry.name, entry.alias]
            if entry.alias is not None
            else [entry.name, str(entry.dtype).removeprefix("torch."), entry.shape, entry.kind]
            for entry in entries
        ],
        "contexts": encoded.header.contexts,
        "scales": encoded.header.scales,
        "planes": planes,
        "skipped": [[skipped.name, skipped.reason] for skipped in plan.skipped],
    }
    data = container.write_container({"stream": encoded.words, "rest": rest, "index": container.write_json(index)})
    check_unfolded(entries, len(data), "the model")

    kept = {
        entry.name: size * values[entry.name].size / max(1, numbers.size)
        for chunk, numbers, size in zip(chunks, stacked, sizes, strict=True)
        for entry, _ in chunk
    }
    bits = sum(encoded.code_bits) + sum(encoded.scale_bits)
    byte = encoded.words.nbytes / bits if bits else 0.0
    layers = {
        entry.name: round(byte * (code + scale) + kept.get(entry.name, 0.0))
        for entry, code, scale in zip(in_stream, encoded.code_bits, encoded.scale_bits, strict=True)
    }
    scales = round(byte * sum(encoded.scale_bits))
    metadata = len(data) - encoded.words.nbytes - rest.nbytes
    return data, PackedSize(len(data), encoded.words.nbytes - scales, scales, rest.nbytes, metadata, layers)


def _split(model: nn.Module, plan: CompressionPlan) -> tuple[list[Entry], dict[str, Tensor], list[entropy.Block]]:
    """List the keys of the state dict, the tensors that are stored (tied ones once), and what goes into the stream."""
    state = model.state_dict()
    quantized = plan.allocation.bits if plan.allocation else {}
    check_plan(model, plan)
    entries: list[Entry] = []
    tensors: dict[str, Tensor] = {}
    blocks: list[entropy.Block] = []
    for key, names in zip(state, sharing(state), strict=True):
        if names[0] in tensors:
            alias = next(i for i, entry in enumerate(entries) if entry.name == names[0])
            entries.append(Entry(key, alias=alias))
            continue
        weight = _dense(names[0], state[names[0]])
        for name in names:
            if name in plan.mask.keep:
                _check_mask(name, weight, plan.mask[name])
        planned = next((name for name in names if name in quantized), None)
        kind = RAW
        if planned is not None and weight.numel():
            kind = CODES
            blocks.append(_codes(planned, weight, quantized[planned], plan.scales[planned]))
        elif any(name in plan.mask.keep for name in names) and weight.dim():
            bitmap = (weight != 0).reshape(len(weight), -1)
            if 8 * weight.element_size() * int((~bitmap).sum()) > weight.numel():
                kind = BITMAP
                rows = np.full(len(weight), entropy.BITMAP, np.uint8)
                blocks.append(entropy.Block(bitmap.to(torch.int8).numpy(), rows))
        entries.append(Entry(names[0], weight.dtype, tuple(weight.shape), kind))
        tensors[names[0]] = weight
    return entries, tensors, blocks


def _codes(name: str, weight: Tensor, bits: Tensor, scale: Tensor) -> entropy.Block:
    """Recover the integers of a quantized weight, and prove that they give it back."""
    channels = len(weight) if weight.dim() else 0
    if weight.dtype not in CODE_DTYPES or bits.shape != (channels,) or scale.shape != (channels,):
        raise ArtifactError(
            f"{name}: expected bit widths and scales for the {channels} channels of a {weight.dtype} of shape "
            f"{tuple(weight.shape)}, got shapes {tuple(bits.shape)} and {tuple(scale.shape)}; "
            "save the model that the plan is of"
        )
    bits, step = bits.detach().cpu().to(torch.int64), scale.detach().cpu().float()[:, None] + 0.0  # no negative zero
    coarse = step.to(torch.bfloat16)
    if not (torch.equal(coarse.float(), step) and bool(torch.isfinite(step).all()) and bool((step >= 0).all())):
        raise ArtifactError(
            f"{name}: expected scales >= 0 that bfloat16 holds exactly; round them with "
            "scale.to(torch.bfloat16).float() before the weights are quantized"
        )
    rows = weight.reshape(channels, -1)
    codes = torch.round(rows.float() / torch.where(step > 0, step, 1.0))
    off = ~(((codes * step).to(weight.dtype) == rows) & (codes.abs() <= (1 << (bits - 1))[:, None] - 1))
    if bool(off.any()):
        channel, column = (int(i) for i in off.nonzero()[0])
        raise ArtifactError(
            f"{name}: expected every weight to be its scale times an integer of its bit width; channel {channel} has "
            f"{int(bits[channel])} bits, scale {float(step[channel]):g} and a weight {float(rows[channel, column]):g} "
            f"({int(off.sum())} such weights); write the quantized values into the model, then save it with their plan"
        )
    pattern = coarse[:, 0].view(torch.int16).numpy().view(np.uint16)
    return entropy.Block(codes.to(torch.int8).numpy(), bits.to(torch.uint8).numpy(), pattern)


def _check_mask(name: str, weight: Tensor, keep: Tensor) -> None:
    if keep.shape != weight.shape:
        raise ArtifactError(
            f"{name}: expected a mask of shape {tuple(weight.shape)}, got {tuple(keep.shape)}; "
            "save the model that the plan is of"
        )
    wrong = int((weight[~keep.cpu()] != 0).sum())
    if wrong:
        raise ArtifactError(
            f"{name}: expected zeros where the mask prunes, got {wrong} other weights; "
            "write the masked values into the model, then save it"
        )


def _dense(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ArtifactError(
            f"{name}: expected a tensor in the state dict, got {type(tensor).__name__}; "
            "a packed file holds tensors alone: keep extra state elsewhere and return none from get_extra_state"
        )
    if is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES.values():
        raise ArtifactError(
            f"{name}: expected a dense tensor with values, got {tensor.dtype}, {tensor.layout} on {tensor.device}; "
            "convert it before saving"
        )
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


register(Format("safetensors", "model.safetensors", write=write_packed, check=check_packed, read=read_packed))
