"""The format "onnx": one file that onnxruntime runs, its weights INT2, INT4 or INT8 with one scale per output channel.

Widths 2, 3-4 and 5-8 travel as INT2, INT4 and INT8. The file is checked before it counts as written: onnxruntime runs
it on the examples, and its outputs are compared with the model's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.codes import integer_codes, storage_width
from lightning_xai_compress.formats.onnx_graph import INT2_VERSIONS, INT4_VERSIONS, holds_float, quantize_input, readers
from lightning_xai_compress.formats.onnx_trace import trace
from lightning_xai_compress.formats.registry import Contents, Files, Format, Inputs, check_plan, register
from lightning_xai_compress.formats.tracing import calls, check_examples, evaluation, to_device
from lightning_xai_compress.plan import CompressionPlan

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["TOLERANCE", "check_onnx", "onnx_session", "read_onnx", "write_onnx"]

TOLERANCE = 1e-4
"""Largest difference from the model, relative to its largest output, at which a file still counts as the model."""

_LARGEST_FILE = 2**31 - 1
_FILES = Files()


def write_onnx(
    model: nn.Module, plan: CompressionPlan, path: Path, examples: Sequence[Inputs], files: Files = _FILES
) -> None:
    """Write a model as ONNX with integer weights.

    The first dimension of the inputs, and each dimension in which the examples differ, is dynamic.

    Args:
        model: Its parameters hold the quantized values; left exactly as it was.
        plan: Bit widths and scales. What has none stays float.
        path: File to write.
        examples: Inputs of the model. The first is traced.
        files: Which integer types it may hold.

    Raises:
        ArtifactError: There is no example, the model cannot be traced, a weight is off its grid or not found in the
            graph, or the file would exceed 2 GB.
    """
    import onnx

    check_plan(model, plan)
    check_examples("onnx", examples)
    codes = _codes(model, plan)
    with evaluation(model):
        examples = [to_device(model, example) for example in examples]
        inputs, expected = calls(model, examples)
        # from opset 23 on, the exporter emits Attention, and onnxruntime refuses some of its masks
        opset = INT4_VERSIONS[0]
        proto = trace(model, examples[0], inputs, weights=list(codes), outputs=list(expected[0]), opset=opset)
    # opsets 22 to 25 add types and operators, and change none
    standard = next(entry for entry in proto.opset_import if not entry.domain)
    standard.version, proto.ir_version = _versions(plan, files)
    _quantize(proto, model, plan, codes, files)
    proto.metadata_props.extend(
        onnx.StringStringEntryProto(key=key, value=value) for key, value in sorted(plan.provenance.items())
    )
    _write(proto, path)


def check_onnx(path: Path, model: nn.Module, examples: Sequence[Inputs], files: Files = _FILES) -> float:
    """Prove that onnxruntime computes from a file what the model does.

    Returns:
        Largest absolute difference of an output, relative to the largest value of that output.

    Raises:
        ArtifactError: It does not run, or an output differs by more than `TOLERANCE`.
    """
    check_examples("onnx", examples)
    with evaluation(model):
        inputs, expected = calls(model, [to_device(model, example) for example in examples])
    return _compare(path, inputs, expected)


def read_onnx(path: Path) -> Contents:
    """Tell what a file holds: names and widths of its weights, dequantized (with BatchNorm, where it was folded in)."""
    raise NotImplementedError


def onnx_session(path: str | Path) -> Any:
    """Open a written file with onnxruntime on the CPU: weights are dequantized once, at loading, and stay exact.

    With default options the outputs are the same, but the weights are dequantized in every run, which is slower.

    Args:
        path: The file.

    Returns:
        An `onnxruntime.InferenceSession`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # were a product with quantized weights fused all the same: with float activations, not rounded to 8 bits
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _codes(model: nn.Module, plan: CompressionPlan) -> dict[str, Tensor]:
    """Integer codes of all weights that the plan quantizes."""
    if plan.allocation is None:
        return {}
    parameters = dict(model.named_parameters())
    return {
        name: integer_codes(name, parameters[name], plan.scales[name], bits)
        for name, bits in sorted(plan.allocation.bits.items())
    }


def _versions(plan: CompressionPlan, files: Files) -> tuple[int, int]:
    """Opset and IR version: as old as the integer types allow, so that most runtimes take the file."""
    bits = plan.allocation.bits.values() if plan.allocation else ()
    return (
        INT2_VERSIONS
        if any(bool((storage_width(width, files.onnx_bits) == 2).any()) for width in bits)
        else INT4_VERSIONS
    )


def _quantize(
    proto: ModelProto, model: nn.Module, plan: CompressionPlan, codes: Mapping[str, Tensor], files: Files
) -> None:
    """Give the graph its integer weights; a layer that evaluation does not use is left out, by name."""
    if plan.allocation is None:
        return
    parameters = dict(model.named_parameters())
    inputs = {entry.name: entry for entry in proto.graph.input}
    unused = [name for name in codes if not readers(proto.graph, name)]
    for name in unused:
        if holds_float(proto.graph, parameters[name]):
            raise ArtifactError(
                f"{name} is in the graph, but not as the parameter of its layer: {type(model).__name__} keeps another "
                "reference to it. Use the layer's own parameter in forward, or leave 'onnx' out of formats"
            )
        proto.graph.input.remove(inputs[name])
    if unused:
        warnings.warn(
            f"not in the ONNX file, since {type(model).__name__} does not use them in evaluation: {', '.join(unused)}",
            stacklevel=3,
        )
    for name in sorted(set(codes) - set(unused), reverse=True):  # each puts its nodes in front
        dtype = inputs[name].type.tensor_type.elem_type
        storage = storage_width(plan.allocation[name].cpu(), files.onnx_bits)
        quantize_input(proto.graph, name, codes[name], plan.scales[name], storage, dtype)


def _write(proto: ModelProto, path: Path) -> None:
    import onnx

    try:
        size = proto.ByteSize()
        if size <= _LARGEST_FILE:
            onnx.checker.check_model(proto, full_check=True)
            content = proto.SerializeToString(deterministic=True)
    except Exception as error:  # protobuf and the checker raise types of their own
        raise ArtifactError(f"the ONNX graph is not valid: {error}") from error
    if size > _LARGEST_FILE:
        raise ArtifactError(
            f"the ONNX file would take {size / 2**30:.1f} GB, a single file holds 2: leave 'onnx' out of formats"
        )
    path.write_bytes(content)


def _compare(path: Path, inputs: Sequence[Mapping[str, Tensor]], expected: Sequence[Mapping[str, Tensor]]) -> float:
    """Run the file on all examples; largest difference of an output, relative to the largest value of that output."""
    try:
        session = onnx_session(path)
        names = [entry.name for entry in session.get_inputs()]  # in the order of ours, of which one may be renamed
        outputs = [entry.name for entry in session.get_outputs()]
        feeds = [(tensor.cpu().numpy() for tensor in entry.values()) for entry in inputs]
        got = [session.run(outputs, dict(zip(names, feed, strict=True))) for feed in feeds]
    except Exception as error:  # onnxruntime raises types of its own
        raise ArtifactError(f"onnxruntime cannot run the ONNX file on the examples: {error}") from error
    worst = 0.0
    for position, name in enumerate(expected[0]):
        pairs = [(torch.as_tensor(run[position]), entry[name].cpu()) for run, entry in zip(got, expected, strict=True)]
        for ours, theirs in pairs:
            if ours.shape != theirs.shape:
                raise ArtifactError(f"{name}: the ONNX file gives {tuple(ours.shape)}, the model {tuple(theirs.shape)}")
        largest = max(_largest(theirs.double()) for _, theirs in pairs)
        difference = max(_gap(ours.double(), theirs.double()) for ours, theirs in pairs)
        relative = difference / largest if largest else difference
        if relative > TOLERANCE:
            raise ArtifactError(
                f"{name}: the ONNX file differs from the model by {difference:.3g}, which is {relative:.3g} of the "
                f"largest value, {largest:.3g}; allowed are {TOLERANCE:g}. Leave 'onnx' out of formats"
            )
        worst = max(worst, relative)
    return worst


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; infinite where only one is finite, none where both are the same infinity or NaN."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    gap = (ours - theirs).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))[~same]
    return float(gap.max()) if gap.numel() else 0.0


register(
    Format(
        "onnx",
        "model.onnx",
        write=write_onnx,
        check=check_onnx,
        read=read_onnx,
        needs=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        traces=True,
    )
)
