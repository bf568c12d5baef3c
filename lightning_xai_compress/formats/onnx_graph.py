"""What turns a traced graph into a compressed one: integer weights, dequantized by the graph itself.

The weights that are to be quantized enter the traced graph as inputs, so that no optimizer folds, transposes or renames
them. Here each such input gives way to integer initializers and the nodes that dequantize them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_xai_compress.formats.codes import pack_codes
from lightning_xai_compress.plan import by_rows

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = [
    "INT2_VERSIONS",
    "INT4_VERSIONS",
    "clean",
    "holds_float",
    "quantize_input",
    "readers",
]

INT4_VERSIONS = (21, 10)
"""Opset and IR version that INT4 came with."""

INT2_VERSIONS = (25, 13)
"""Opset and IR version that INT2 came with."""


def quantize_input(
    graph: GraphProto,
    name: str,
    codes: Tensor,
    scale: Tensor,
    storage: Tensor,
    dtype: int,
    codebook: Tensor | None = None,
) -> None:
    """Replace a graph input by integer initializers and the nodes that dequantize them, along axis 0.

    Rows of several storage types become one initializer a type; the graph puts them together and back into order, and
    where a channel has several rows into the shape of the weight.

    Args:
        graph: Graph to edit.
        name: Name of the input: what its consumers read is afterwards the dequantized weight.
        codes: int8 tensor in the shape of the weight.
        scale: float32 scales, shape [rows]; see `plan.by_rows`.
        storage: Integer type of each row, 2, 4 or 8, shape [rows].
        dtype: ONNX element type that the consumers expect.
        codebook: The values that the weights share: codes are places in it, counted from zero's.
    """
    from onnx import TensorProto, helper

    if codebook is not None:
        _share_input(graph, name, codes, scale, int(storage.max()), dtype, codebook)
        return

    types = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}
    scale = scale.detach().cpu().float()
    shape, codes = codes.shape, by_rows(codes, len(storage))
    widths = sorted(set(storage.tolist()))
    rows = [torch.nonzero(storage == width).flatten() for width in widths]
    order = torch.cat(rows)
    nodes, parts = [], []
    for width, members in zip(widths, rows, strict=True):
        integers, scales, part = f"{name}.int{width}", f"{name}.int{width}.scale", f"{name}.int{width}.float"
        packed = pack_codes(codes[members], width).tobytes()
        graph.initializer.append(_tensor(integers, types[width], codes[members], packed))
        graph.initializer.append(_tensor(scales, TensorProto.FLOAT, scale[members], scale[members].numpy().tobytes()))
        nodes.append(helper.make_node("DequantizeLinear", [integers, scales], [part], name=part, axis=0))
        parts.append(part)
    # onnxruntime turns a bare DequantizeLinear -> MatMul into a product with 8-bit activations; a Concat is in its way
    if len(parts) > 1 or (codes.dim() == 2 and readers(graph, name) != {"Gemm"}):
        nodes.append(helper.make_node("Concat", parts, [f"{name}.rows"], name=f"{name}.rows", axis=0))
    if not torch.equal(order, torch.arange(len(order))):
        back = torch.argsort(order).to(torch.int32)
        graph.initializer.append(_tensor(f"{name}.order", TensorProto.INT32, back, back.numpy().tobytes()))
        inputs = [nodes[-1].output[0], f"{name}.order"]
        nodes.append(helper.make_node("Gather", inputs, [f"{name}.sorted"], name=f"{name}.sorted", axis=0))
    if codes.shape != shape:
        sizes = torch.tensor(shape)
        graph.initializer.append(_tensor(f"{name}.shape", TensorProto.INT64, sizes, sizes.numpy().tobytes()))
        inputs = [nodes[-1].output[0], f"{name}.shape"]
        nodes.append(helper.make_node("Reshape", inputs, [f"{name}.shaped"], name=f"{name}.shaped"))
    _replace_input(graph, name, nodes, dtype)


def _share_input(
    graph: GraphProto, name: str, codes: Tensor, scale: Tensor, width: int, dtype: int, codebook: Tensor
) -> None:
    """The same for a weight that shares values: codes of one type gather them; a scale that is not 1 is multiplied."""
    from onnx import TensorProto, helper

    types = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}
    integers, places, values = f"{name}.int{width}", f"{name}.places", f"{name}.codebook"
    blocks, count = codebook.shape
    # negative places count from the end, so that codes of the first block are places as they are
    turned = codebook.detach().cpu().float().flatten().roll(-(count // 2))
    scale = scale.detach().cpu().float()
    graph.initializer.append(_tensor(integers, types[width], codes, pack_codes(codes, width).tobytes()))
    graph.initializer.append(_tensor(values, TensorProto.FLOAT, turned, turned.numpy().tobytes()))
    nodes = [helper.make_node("Cast", [integers], [places], name=places, to=TensorProto.INT32)]
    if blocks > 1:
        starts = torch.arange(blocks, dtype=torch.int32).mul(count).repeat_interleave(len(codes) // blocks)
        starts = starts.view(-1, *[1] * (codes.dim() - 1))
        graph.initializer.append(_tensor(f"{name}.starts", TensorProto.INT32, starts, starts.numpy().tobytes()))
        nodes.append(helper.make_node("Add", [places, f"{name}.starts"], [f"{places}.all"], name=f"{places}.all"))
        places = f"{places}.all"
    nodes += [
        helper.make_node("Gather", [values, places], [f"{name}.shared"], name=f"{name}.shared", axis=0),
    ]
    if not torch.equal(scale, torch.ones_like(scale)):
        steps = scale.view(-1, *[1] * (codes.dim() - 1))
        graph.initializer.append(_tensor(f"{integers}.scale", TensorProto.FLOAT, steps, steps.numpy().tobytes()))
        inputs = [nodes[-1].output[0], f"{integers}.scale"]
        nodes.append(helper.make_node("Mul", inputs, [f"{name}.scaled"], name=f"{name}.scaled"))
    _replace_input(graph, name, nodes, dtype)


def _replace_input(graph: GraphProto, name: str, nodes: list[NodeProto], dtype: int) -> None:
    """Let nodes in front of the graph give what a graph input was, in the type that its consumers expect."""
    from onnx import TensorProto, helper

    if dtype != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [nodes[-1].output[0]], [f"{name}.cast"], name=f"{name}.cast", to=dtype))
    nodes[-1].output[0] = name
    for position, node in enumerate(nodes):
        graph.node.insert(position, node)
    graph.input.remove(next(entry for entry in graph.input if entry.name == name))


def readers(graph: GraphProto, name: str) -> set[str]:
    """Types of the nodes that read a value."""
    return {node.op_type for part in _graphs(graph) for node in part.node if name in node.input}


def holds_float(graph: GraphProto, weight: Tensor) -> bool:
    """Whether a float initializer, or its transpose, is this weight."""
    weight = weight.detach().cpu().contiguous()
    wanted = {form.contiguous().numpy().tobytes() for form in (weight, weight.transpose(0, -1))}
    return any(entry.raw_data in wanted for entry in graph.initializer)


def clean(model: ModelProto, names: Mapping[str, str], *, prefix: str, batched: Sequence[str]) -> None:
    """Take out of a traced graph what a user does not need: stack traces with paths, hints, odd names.

    Args:
        model: Model to edit; afterwards the same network gives the same bytes.
        names: New names of values; another value that has such a name already gives way.
        prefix: What the wrapper put before the names of parameters.
        batched: Inputs, by their new names, whose first dimension is to be called "batch".
    """
    model.doc_string = ""
    model.ClearField("metadata_props")
    for graph in _graphs(model.graph):
        graph.doc_string = ""
        graph.ClearField("metadata_props")
        graph.ClearField("value_info")
        for entry in (*graph.node, *graph.initializer, *graph.input, *graph.output):
            entry.doc_string = ""
            entry.ClearField("metadata_props")
    _rename(model.graph, names, prefix)
    _name_dimensions(model.graph, batched)


def _rename(graph: GraphProto, names: Mapping[str, str], prefix: str) -> None:
    """Rename values everywhere in the graph, keeping names unique."""
    taken, renamed = set(names.values()), dict(names)
    for old in _names(graph):
        if old not in renamed:
            new = old.removeprefix(prefix)
            while new in taken:
                new += "_"
            taken.add(new)
            renamed[old] = new
    for part in _graphs(graph):
        for entry in (*part.initializer, *part.input, *part.output):
            entry.name = renamed[entry.name]
        for node in part.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]


def _name_dimensions(graph: GraphProto, batched: Sequence[str]) -> None:
    """Call the symbols of dynamic dimensions batch, dim_1, dim_2 ..., in order of appearance."""
    symbols: dict[str, str] = {}
    inputs = {entry.name: entry.type.tensor_type.shape.dim for entry in graph.input}
    for name in batched:
        symbol = inputs[name][0].dim_param
        if symbol and not symbol.isdigit():
            symbols.setdefault(symbol, f"batch_{name}" if symbols else "batch")

    def rename(match: re.Match[str]) -> str:
        return symbols.setdefault(match.group(), f"dim_{len(symbols)}")

    for entry in (*graph.input, *graph.output):
        for dimension in entry.type.tensor_type.shape.dim:
            if dimension.dim_param.isdigit():  # the exporter's way to write a size that turned out constant
                dimension.dim_value = int(dimension.dim_param)
            elif dimension.dim_param:
                dimension.dim_param = re.sub(r"\b[su]\d+\b", rename, dimension.dim_param)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield the graph and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _names(graph: GraphProto) -> list[str]:
    """All names of values anywhere in the graph, each once."""
    names: dict[str, None] = {}
    for part in _graphs(graph):
        names |= dict.fromkeys(entry.name for entry in (*part.initializer, *part.input, *part.output))
        names |= dict.fromkeys(output for node in part.node for output in node.output if output)
    return list(names)


def _tensor(name: str, data_type: Any, values: Tensor, raw: bytes) -> TensorProto:
    from onnx import TensorProto

    return TensorProto(name=name, data_type=data_type, dims=list(values.shape), raw_data=raw)
