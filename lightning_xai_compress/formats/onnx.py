"""The format "onnx": one file that onnxruntime runs, its weights INT2, INT4 or INT8 with one scale per row.

Widths 2, 3-4 and 5-8 travel as INT2, INT4 and INT8, or in the next wider type that `Files.onnx_bits` allows. BatchNorm
is folded into scales and biases. With 8-bit activations the ranges of the examples are built in. The file is checked
before it counts as written: onnxruntime runs it on the examples, and its outputs are compared with the model's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.codes import integer_codes, storage_width
from lightning_xai_compress.formats.onnx_check import (
    ACTIVATIONS,
    TOLERANCE,
    OnnxModule,
    check_onnx,
    compare,
    onnx_session,
)
from lightning_xai_compress.formats.onnx_fold import fold_batchnorm, pool_globally
from lightning_xai_compress.formats.onnx_graph import INT2_VERSIONS, INT4_VERSIONS, holds_float, quantize_input, readers
from lightning_xai_compress.formats.onnx_int8 import quantize_activations
from lightning_xai_compress.formats.onnx_read import read_onnx
from lightning_xai_compress.formats.onnx_trace import trace
from lightning_xai_compress.formats.registry import Files, Format, Inputs, check_plan, register
from lightning_xai_compress.formats.tracing import calls, check_examples, evaluation, to_device
from lightning_xai_compress.plan import CompressionPlan

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["TOLERANCE", "OnnxModule", "check_onnx", "onnx_session", "read_onnx", "write_onnx"]

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
    pool_globally(proto)
    # opsets 22 to 25 add types and operators, and change none
    standard = next(entry for entry in proto.opset_import if not entry.domain)
    standard.version, proto.ir_version = _versions(plan, files)
    _quantize(proto, model, plan, codes, files)
    provenance = dict(plan.provenance)
    if files.activations == "int8":
        _write(proto, path)
        compare(path, inputs, expected)  # the weights are proven before activations are rounded, too
        names = [entry.name for entry in proto.graph.input]
        feeds = [dict(zip(names, (each.cpu().numpy() for each in entry.values()), strict=True)) for entry in inputs]
        notes = quantize_activations(proto, feeds, ranges=files.ranges)
        if not any(node.op_type == "QuantizeLinear" for node in proto.graph.node):
            raise ArtifactError(
                f"activations='int8': {type(model).__name__} has no layer that onnxruntime runs on integers (float32 "
                f"Conv, Gemm or MatMul with a quantized weight): leave 8-bit activations out. {'; '.join(notes)}"
            )
        if notes:
            warnings.warn(f"8-bit activations: {'; '.join(notes)}", stacklevel=2)
        provenance[ACTIVATIONS] = "int8"
    proto.metadata_props.extend(
        onnx.StringStringEntryProto(key=key, value=value) for key, value in sorted(provenance.items())
    )
    _write(proto, path)


def _codes(model: nn.Module, plan: CompressionPlan) -> dict[str, Tensor]:
    """Integer codes of all weights that the plan quantizes."""
    if plan.allocation is None:
        return {}
    parameters = dict(model.named_parameters())
    return {
        name: integer_codes(name, parameters[name], plan.scales[name], bits, plan.codebooks.get(name))
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
    scales = fold_batchnorm(proto.graph, {name: plan.scales[name] for name in codes})
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
        codebook = plan.codebooks.get(name)
        quantize_input(proto.graph, name, codes[name], scales[name], storage, dtype, codebook)


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
