"""`verify`: whether a file is the model of a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_xai_compress.commands.checkpoints import build_model, load_checkpoint, parse_settings
from lightning_xai_compress.commands.inputs import find_inputs
from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import Contents, Files, Format, file_format, round_to_float16
from lightning_xai_compress.formats.layout import few, same

__all__ = ["verify"]


def verify(arguments: argparse.Namespace) -> int:
    """Print the difference, and "the same" or what differs."""
    path, source = Path(arguments.file), Path(arguments.against)
    entry = file_format(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file, got {path}, which is none")
    if entry.name == "onnx" and arguments.model is None:
        raise ValueError(
            "an ONNX file holds a graph with BatchNorm folded in, not the state dict: give --model module:Class, so "
            "that outputs can be compared, too"
        )
    checkpoint = load_checkpoint(source, trust=arguments.trust)
    if not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ArtifactError(f"{source}: expected a Lightning checkpoint with a 'state_dict'; give a .ckpt")
    if entry.name == "onnx":
        wrong = _other_rows(entry.read(path), checkpoint["state_dict"])
        if wrong:
            print(f"differs: {few(wrong)}")
            return 1
    else:
        wrong, difference = _differences(entry.read(path), checkpoint["state_dict"], rounded=arguments.float16)
        print(f"largest difference of a weight: {difference:.3g}")
        if wrong:
            print(f"differs: {few(wrong)}")
            if entry.read(path).provenance.get("structure"):
                print("the file lost channels, which the checkpoint still holds, masked: only outputs can be compared")
            return 1
    if arguments.model is not None and not _outputs_agree(entry, path, checkpoint, arguments):
        return 1
    print("the same")
    return 0


def _differences(contents: Contents, state: Mapping[str, Any], *, rounded: bool) -> tuple[list[str], float]:
    """Names of all tensors that are not the same bit for bit, and by how much they differ at most."""
    stored = {each.name: each.values for each in contents.tensors}
    own = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if rounded:  # what float16 does not hold well was left as it is
        floats = {each.name for each in contents.tensors if not each.bits} & {
            name for name, tensor in own.items() if tensor.is_floating_point()
        }
        halves = {name: own[name].to(torch.float16).to(own[name].dtype) for name in floats}
        own |= {name: half for name, half in halves.items() if same(half, stored[name])}
    wrong = [name for name in {**own, **stored} if not same(own.get(name), stored.get(name))]
    gaps = [_gap(own.get(name), stored.get(name)) for name in wrong]
    return wrong, max(gaps, default=0.0)


def _other_rows(contents: Contents, state: Mapping[str, Any]) -> list[str]:
    """Names of quantized weights that are no multiples of the checkpoint's, row by row.

    BatchNorm is folded into the scale of each row, so rows are compared in units of their largest weight.
    """
    wrong = []
    for stored in contents.tensors:
        weight = state.get(stored.name)
        if not stored.bits or not isinstance(weight, Tensor):
            continue
        rows, own = stored.values.double().flatten(1), weight.detach().double().flatten(1)
        if rows.shape != own.shape:
            wrong.append(stored.name)
            continue
        rows, own = _in_units(rows), _in_units(own)
        alive = (rows != 0).any(1)  # a folded gamma of zero leaves nothing to compare
        same_sign, flipped = ((rows - sign * own).abs().amax(1) for sign in (1, -1))
        if bool((torch.minimum(same_sign, flipped)[alive] > 1e-5).any()):
            wrong.append(stored.name)
    return wrong


def _in_units(rows: Tensor) -> Tensor:
    largest = rows.abs().amax(1, keepdim=True)
    return rows / torch.where(largest > 0, largest, 1.0)


def _gap(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None or one.shape != other.shape or not one.numel():
        return float("inf")
    gap = (one.double() - other.double()).abs()
    return float(gap.nan_to_num(nan=float("inf")).max())


def _outputs_agree(entry: Format, path: Path, checkpoint: Mapping[str, Any], arguments: argparse.Namespace) -> bool:
    model = build_model(
        arguments.model,
        Path(arguments.against),
        checkpoint,
        settings=parse_settings(arguments.init),
        trust=arguments.trust,
    )
    if arguments.float16:
        from lightning_xai_compress.callbacks.checkpoint import plan_of  # brings Lightning

        round_to_float16(model, set(plan_of(checkpoint).mask.keep))
    examples = [find_inputs(model, arguments.inputs, arguments.input_shape)] if entry.traces else []
    try:
        difference = entry.check(path, model, examples, Files())
    except ArtifactError as error:
        print(f"differs: {error}")
        return False
    print(f"largest difference of the {'outputs' if entry.traces else 'tensors'}: {difference:.3g}")
    return True
