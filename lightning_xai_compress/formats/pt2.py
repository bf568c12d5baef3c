"""The format "pt2": a program of torch.export that needs torch alone to load and run, and is exactly the model.

Quantized weights lie bit-packed in uint8 buffers and are put together inside the graph, each time that it runs:

    torch.export.load("model.pt2").module()(x)

docs/command-line.md says how to look into a file; `read_pt2` reads it without torch.export and without pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.layout import DTYPES, few, is_plain, same
from lightning_xai_compress.formats.pt2_archive import Archive, read_archive, write_archive
from lightning_xai_compress.formats.pt2_planes import PackedWeight, memory_order, read_weight
from lightning_xai_compress.formats.pt2_trace import trace_program, with_packed_weights
from lightning_xai_compress.formats.registry import Contents, Files, Format, Inputs, Stored, check_plan, register
from lightning_xai_compress.formats.tracing import (
    call,
    calls,
    check_examples,
    evaluation,
    first_line,
    quiet,
    to_device,
)
from lightning_xai_compress.layers import tensor_places
from lightning_xai_compress.plan import CompressionPlan

__all__ = ["check_pt2", "read_pt2", "write_pt2"]

TOLERANCE = 1e-5
"""Largest difference of an output, relative to the largest: kernels may sum in another order."""

_FILES = Files()


def write_pt2(
    model: nn.Module, plan: CompressionPlan, path: Path, examples: Sequence[Inputs], files: Files = _FILES
) -> None:
    """Write a model as a program of torch.export for the CPU.

    Its arguments and outputs are those of the model in evaluation mode. The first dimension of the inputs, and each
    dimension in which the examples differ, is dynamic. The examples do not go into the file.

    Args:
        model: Its parameters hold the quantized values; left exactly as it was.
        plan: Bit widths and scales. What has none stays as it is.
        path: File to write.
        examples: Inputs of the model. The first is traced.
        files: Not used.

    Raises:
        ArtifactError: There is no example, the model cannot be traced, or a weight is off its grid or used under
            another reference than its layer's.
    """
    check_plan(model, plan)
    check_examples("pt2", examples)
    odd = [name for name, tensor in _state(model).items() if tensor.is_meta or not is_plain(tensor)]
    if odd:
        raise ArtifactError(f"{few(odd)}: expected plain tensors with values; build the model on a real device")
    packed = _packed(model, plan)
    with evaluation(model):
        examples = [to_device(model, example) for example in examples]
        inputs, _ = calls(model, examples)
        program = trace_program(model, packed, examples[0], inputs)
    _check_constants(model, packed, program)
    if any(tensor.device.type != "cpu" for tensor in program.state_dict.values()):
        program = move_to_device_pass(program, "cpu")
    index = {
        "version": max((weight.version for weight in packed.values()), default=1),
        "tensors": _entries(model, packed),
        "provenance": dict(plan.provenance),
        "skipped": [[skipped.name, skipped.reason] for skipped in plan.skipped],
    }
    with quiet():
        write_archive(path, program, index)


def check_pt2(path: Path, model: nn.Module, examples: Sequence[Inputs], files: Files = _FILES) -> float:
    """Prove that a file gives all tensors of the model back exactly, and the outputs of the frozen model.

    That is `model.eval().requires_grad_(False)` without fused attention: PyTorch picks other kernels where a weight
    requires a gradient, which differ in the last bits.

    Returns:
        The largest absolute difference: 0.0.

    Raises:
        ArtifactError: It does not.
    """
    check_examples("pt2", examples)
    stored = {entry.name: entry.values for entry in read_pt2(path).tensors}
    own = _state(model)
    wrong = [name for name in {**own, **stored} if not same(own.get(name), stored.get(name))]
    if wrong:
        raise ArtifactError(
            f"{path} does not give these tensors back exactly: {few(wrong)}. "
            "It is of another model, or weights changed since it was written: export again"
        )
    with evaluation(model):
        examples = [to_device(model, example) for example in examples]
        _, expected = calls(with_packed_weights(model, {}), examples)
        program = _load(path, model)
        for example, ours in zip(examples, expected, strict=True):
            _compare(path, model, program, example, ours)
    return 0.0


def read_pt2(path: Path) -> Contents:
    """Tell what a file holds, in the order of the state dict; nothing in it is run or unpickled.

    Raises:
        FileNotFoundError: No such file.
        ArtifactError: It is damaged, cut short, or none of ours.
    """
    archive = read_archive(Path(path))
    tensors: dict[str, Stored] = {}
    counted: set[str] = set()
    try:
        for entry in archive.index["tensors"]:
            tensors[entry["name"]] = _stored(archive, entry, tensors, counted)
        provenance = {str(key): str(value) for key, value in archive.index["provenance"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise ArtifactError(f"{path} is damaged: expected an index that fits its tensors, got {what}") from error
    return Contents(tuple(tensors.values()), provenance)


def _packed(model: nn.Module, plan: CompressionPlan) -> dict[str, PackedWeight]:
    """What the plan quantizes, by the first name that each weight has."""
    if plan.allocation is None:
        return {}
    places, parameters = tensor_places(model), dict(model.named_parameters())
    firsts = {places.get(name, name): name for name in sorted(plan.allocation.bits)}
    unknown = [name for name in firsts if name not in parameters]
    if unknown:
        raise ArtifactError(f"the plan quantizes what is no parameter of {type(model).__name__}: {few(unknown)}")
    return {
        first: PackedWeight(name, parameters[first], plan.scales[name], plan.allocation[name], plan.codebooks.get(name))
        for first, name in firsts.items()
        if parameters[first].numel()
    }


def _check_constants(
    model: nn.Module, packed: Mapping[str, PackedWeight], program: torch.export.ExportedProgram
) -> None:
    parameters = dict(model.named_parameters())
    for constant in program.constants.values():
        for name in packed:
            if isinstance(constant, Tensor) and same(constant.detach(), parameters[name]):
                raise ArtifactError(
                    f"{name} is in the graph, but not as the parameter of its layer: {type(model).__name__} keeps "
                    "another reference to it. Use the layer's own parameter in forward, or leave 'pt2' out of formats"
                )


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a state dict holds, by all of their names, with those of modules registered twice."""
    return {
        f"{prefix}.{name}".lstrip("."): tensor
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


def _entries(model: nn.Module, packed: Mapping[str, PackedWeight]) -> list[dict[str, Any]]:
    first: dict[int, str] = {}
    entries: list[dict[str, Any]] = []
    for name, tensor in _state(model).items():
        if first.setdefault(id(tensor), name) != name:
            entries.append({"name": name, "alias": first[id(tensor)]})
            continue
        entry = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        if name in packed:
            entries.append(entry | {"groups": packed[name].groups})
        else:
            entries.append(entry | {"order": memory_order(tensor)})
    return entries


def _stored(archive: Archive, entry: Mapping[str, Any], before: Mapping[str, Stored], counted: set[str]) -> Stored:
    name = entry["name"]
    if name in before:
        raise ValueError(f"{name} is there twice")
    if "alias" in entry:
        return Stored(name, before[entry["alias"]].values, before[entry["alias"]].bits, 0)
    dtype, shape = DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
    if "groups" in entry:
        groups = [(int(width), int(count)) for width, count in entry["groups"]]
        if archive.index["version"] == 1 and sum(count for _, count in groups) != shape[0]:
            raise ValueError(f"{shape[0]} rows, but groups of {[count for _, count in groups]}")
        members = {
            key.removeprefix(f"{name}."): value for key, value in archive.tensors.items() if key.startswith(f"{name}.")
        }
        values = read_weight({key: member.array for key, member in members.items()}, groups, shape, dtype)
    else:
        groups, members = [], {"": archive.tensors[name]}
        order = [int(index) for index in entry["order"]]
        array = members[""].array
        numbers = torch.from_numpy(array).view(dtype) if array.size else torch.empty(0, dtype=dtype)
        values = numbers.reshape([shape[index] for index in order]).permute([order.index(i) for i in range(len(order))])
    size = sum(
        member.bytes
        for member in {each.member: each for each in members.values()}.values()
        if member.member not in counted
    )
    counted |= {member.member for member in members.values()}
    return Stored(name, values, dict(groups), size)


def _load(path: Path, model: nn.Module) -> nn.Module:
    try:
        with quiet():
            program = torch.export.load(str(path))
            device = next((tensor.device for tensor in _state(model).values()), torch.device("cpu"))
            if device.type != "cpu":
                program = move_to_device_pass(program, device)
            return program.module()
    except Exception as error:  # torch raises whatever it meets
        raise ArtifactError(f"torch.export.load cannot read {path}: {first_line(error)}; export it again") from error


def _compare(path: Path, model: nn.Module, program: nn.Module, example: Inputs, ours: Mapping[str, Tensor]) -> None:
    try:
        theirs = call(program, example)
    except ArtifactError as error:
        raise ArtifactError(f"{path} cannot run on the examples: {first_line(error)}") from error
    if ours.keys() != theirs.keys():
        raise ArtifactError(f"{path} gives {few(list(theirs))}, {type(model).__name__} gives {few(list(ours))}")
    for name, tensor in ours.items():
        largest = float(tensor.double().abs().nan_to_num(0.0, 0.0, 0.0).max()) if tensor.numel() else 0.0
        close = tensor.shape == theirs[name].shape and torch.allclose(
            tensor.double(), theirs[name].double(), rtol=0, atol=TOLERANCE * largest, equal_nan=True
        )
        if not close:
            raise ArtifactError(
                f"{name}: {path} holds the very weights of {type(model).__name__}, but gives other outputs. Expected "
                f"equal ones to {TOLERANCE:g} of the largest: forward must give the same twice in evaluation mode (no "
                "random numbers), and must not choose its path by the values of its inputs. Mend it, or leave 'pt2' "
                "out of formats"
            )


register(Format("pt2", "model.pt2", write=write_pt2, check=check_pt2, read=read_pt2, traces=True))
