"""Tracing a model into an ONNX graph whose quantized weights are still inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.onnx_graph import clean
from lightning_xai_compress.formats.registry import Inputs
from lightning_xai_compress.formats.tracing import batched_inputs, export_program, first_line, quiet

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["trace"]


def trace(
    model: nn.Module,
    example: Inputs,
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    weights: Sequence[str],
    outputs: Sequence[str],
    opset: int,
) -> ModelProto:
    """Trace the model into a graph that takes some of its weights as inputs, named as the parameters are.

    Weights that are constants would be folded, transposed and renamed by the exporter; inputs it has to leave alone.

    Args:
        model: In evaluation mode.
        example: The call to trace.
        inputs: Named tensors of all examples, that one first: dimensions in which they differ become dynamic.
        weights: Parameters that become inputs, ahead of the others.
        outputs: Names for the output tensors.
        opset: ONNX opset version.

    Raises:
        ArtifactError: The model cannot be traced, or an operation has no ONNX form.
    """
    first = inputs[0]
    names = {f"weight::{index}": name for index, name in enumerate(weights)}
    names |= {f"input::{index}": f"{name}_input" if name in outputs else name for index, name in enumerate(first)}
    # an output may have the name of a weight, but not in one graph
    results = {f"output::{index}": f"{name}_output" if name in weights else name for index, name in enumerate(outputs)}
    program = export_program(model, example, inputs, weights=weights)
    try:
        with quiet():
            _four_axes(program)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=list(names),
                output_names=list(results),
                verbose=False,
            )
        assert exported is not None
        proto = exported.model_proto
    except Exception as error:  # the exporter raises types of its own
        raise ArtifactError(
            f"{type(model).__name__} could not be written as ONNX: {first_line(error)}. Leave 'onnx' out of formats"
        ) from error
    renamed = dict(zip(first, list(names.values())[len(weights) :], strict=True))
    clean(proto, names | results, prefix="model.", batched=[renamed[name] for name in batched_inputs(first)])
    return proto


def _four_axes(program: torch.export.ExportedProgram) -> None:
    """Give attention without an axis for heads one of size 1, in place: the exporter knows no other."""
    graph, aten = program.graph, torch.ops.aten
    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or node.meta["val"].dim() != 3:
            continue
        with graph.inserting_before(node):
            tensors = [_applied(graph, aten.unsqueeze.default, each, -3) if _wide(each) else each for each in node.args]
        result = node.meta["val"]
        with graph.inserting_after(node):
            flat = graph.call_function(aten.squeeze.dim, (node, -3))
        flat.meta["val"] = result
        node.replace_all_uses_with(flat, delete_user_cb=lambda user, own=flat: user is not own)
        node.args, node.meta["val"] = tuple(tensors), result.unsqueeze(-3)
    program.graph_module.recompile()


def _wide(value: object) -> bool:
    """Whether it has an axis for samples: a mask of two axes is for all of them."""
    return isinstance(value, fx.Node) and value.meta["val"].dim() > 2


def _applied(graph: fx.Graph, operation: Any, value: fx.Node, axis: int) -> fx.Node:
    node = graph.call_function(operation, (value, axis))
    node.meta["val"] = operation(value.meta["val"], axis)
    return node
