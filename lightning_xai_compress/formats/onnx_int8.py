"""8-bit activations: an ONNX graph with integer weights becomes one that onnxruntime runs with integer kernels.

Layers with integer weights read 8-bit codes and, where what follows can go on with them, write 8-bit codes: quantizing
and dequantizing nodes stand around them, and onnxruntime fuses both with the layer between. All else stays float.
The file is meant for onnxruntime's default options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_xai_compress.formats.onnx_codes import StoredWeight, find_weights
from lightning_xai_compress.formats.onnx_places import find_places, insert_places, replace_nodes, users_of
from lightning_xai_compress.formats.onnx_ranges import activation_ranges, grid

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["quantize_activations"]

_LARGEST_BIAS = 2.0**30  # the other half of the int32 range is for what the layer sums up
_SMALLEST_STEP = 1e-30


@dataclass(frozen=True)
class _Layer:
    """A node that can run on integers.

    Args:
        node: Conv, Gemm, or MatMul.
        weight: What it multiplies by.
        bias: float32, shape [channels], that the integer kernel adds; None: none.
    """

    node: NodeProto
    weight: StoredWeight
    bias: NDArray[np.float32] | None = None


def quantize_activations(
    proto: ModelProto, feeds: Sequence[Mapping[str, NDArray[Any]]], *, ranges: str = "minmax"
) -> list[str]:
    """Turn a graph with integer weights into one with 8-bit activations (uint8, zero exact); edits it in place.

    Convolutions, and products with a weight, run on integers. Biases are rounded to int32 at the step that their sums
    have. Weights keep their values, with one exception: a channel whose step is so small beside its bias that int32
    does not hold the bias gets a wider step, by which each weight moves less than 1e-9 of the bias over the input step.

    Args:
        proto: As `quantize_input` left it.
        feeds: Calibration inputs by name, one mapping a run.
        ranges: How a range is chosen: "minmax", "percentile" or "mse", see `activation_ranges`.

    Returns:
        What did not come out as one would expect, a line each: weights that stay float, channels with wider steps.

    Raises:
        ValueError: There are no feeds, or the method is unknown.
        ArtifactError: A value is not finite, or onnxruntime cannot run the graph on the feeds.
    """
    graph = proto.graph
    weights = find_weights(graph)
    layers = list(_layers(graph, weights))
    kept = {entry.name for entry in graph.output} | _read_inside(graph)
    places = find_places(graph, [layer.node for layer in layers], kept)
    own = [place.tensor for place in places if place.like is None]
    measured = activation_ranges(proto, own, feeds, ranges=ranges)
    grids = {name: grid(bounds) for name, bounds in measured.items()}
    steps: dict[str, float] = {}  # of all places: one without a grid of its own stands after the place that it is like
    for place in places:
        steps[place.tensor] = float(grids[place.tensor][0]) if place.like is None else steps[place.like]
    front, notes = [], []
    for name in sorted(weights):
        weight, using = weights[name], [layer for layer in layers if layer.weight.name == name]
        readers, widened = _float_readers(graph, weight, using), _fit_steps(weight, using, steps)
        front += _dequantize(graph, weight, using, readers)
        what = "groups of input channels" if weight.grouped else "it"
        notes += [f"{name} stays float in {node.op_type}, which has no integer kernel for {what}" for node in readers]
        notes += [f"{name}: wider steps in {widened} channels, whose bias is large beside them"] if widened else []
    for layer in layers:
        front += _quantize_bias(graph, layer, steps[layer.node.input[0]])
    gone = {node.output[0] for weight in weights.values() for node in weight.nodes}
    replace_nodes(graph, [*front, *(node for node in graph.node if node.output[0] not in gone)])
    insert_places(graph, places, grids, kept)
    used = {name for node in graph.node for name in node.input} | kept
    initializers = [entry for entry in graph.initializer if entry.name in used]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    return notes


def _layers(graph: GraphProto, weights: Mapping[str, StoredWeight]) -> Iterator[_Layer]:
    """Find nodes that have integer kernels: rows of the weight are output channels, and the bias is constant."""
    from onnx import helper, numpy_helper

    constants = {entry.name: entry for entry in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[0] in constants:
            continue
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        name = node.input[1]
        if node.op_type == "MatMul":
            maker = makers.get(name)
            name = maker.input[0] if maker is not None and maker.op_type == "Transpose" else ""
        elif node.op_type == "Gemm":
            scaled = attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0
            name = "" if scaled or attributes.get("transA", 0) or not attributes.get("transB", 0) else name
        if name not in weights or weights[name].grouped:  # an integer kernel takes one step an output channel
            continue
        bias = node.input[2] if len(node.input) > 2 else ""
        if not bias:
            yield _Layer(node, weights[name])
        elif bias in constants and list(constants[bias].dims) == [len(weights[name].step)]:
            yield _Layer(node, weights[name], numpy_helper.to_array(constants[bias]))


def _read_inside(graph: GraphProto) -> set[str]:
    """Names that graphs inside of nodes (branches, loops) read."""
    inner = [
        part
        for node in graph.node
        for attribute in node.attribute
        for part in (attribute.g, *attribute.graphs)
        if part.node
    ]
    return {name for part in inner for node in part.node for name in node.input} | {
        name for part in inner for name in _read_inside(part)
    }


def _float_readers(graph: GraphProto, weight: StoredWeight, layers: Sequence[_Layer]) -> list[NodeProto]:
    """Nodes that read a weight and are none of the layers, nor what transposes it for them."""
    users = users_of(graph)
    integer = {layer.node.output[0] for layer in layers}

    def is_float(node: NodeProto) -> bool:
        transposed = users.get(node.output[0], []) if node.op_type == "Transpose" else []
        return node.output[0] not in integer and not any(user.output[0] in integer for user in transposed)

    return [node for node in users.get(weight.name, []) if is_float(node)]


def _fit_steps(weight: StoredWeight, layers: Sequence[_Layer], steps: Mapping[str, float]) -> int:
    """Make steps positive, and so wide that int32 holds the bias; returns in how many channels they had to grow."""
    step = np.abs(weight.step.astype(np.float64))
    least = np.full_like(step, _SMALLEST_STEP)
    for layer in layers:
        if layer.bias is not None:
            least = np.maximum(least, np.abs(layer.bias) / (steps[layer.node.input[0]] * _LARGEST_BIAS))
    empty = ~weight.codes.reshape(len(step), -1).any(axis=1)
    weight.restep(np.maximum(step, least).astype(np.float32))
    return int(((step < least) & ~empty).sum())


def _dequantize(
    graph: GraphProto, weight: StoredWeight, layers: Sequence[_Layer], readers: Sequence[NodeProto]
) -> list[NodeProto]:
    """Nodes that give a weight to its readers.

    Layers on integers need a DequantizeLinear. The others get a product: onnxruntime computes that once, at loading,
    but a DequantizeLinear in every run.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes, codes = weight.build(graph)
    if layers:
        scale = f"{weight.name}.scale"
        graph.initializer.append(numpy_helper.from_array(weight.step, scale))
        inputs = [codes, scale]
        if any(layer.node.op_type == "Gemm" for layer in layers):  # which is fused only with a zero point
            inputs.append(f"{weight.name}.zero_point")
            graph.initializer.append(numpy_helper.from_array(np.zeros(len(weight.step), np.int8), inputs[-1]))
        name = f"{weight.name}.float"
        nodes.append(helper.make_node("DequantizeLinear", inputs, [weight.name], name=name, axis=0))
        products = [layer.node for layer in layers if layer.node.op_type == "MatMul"]
        # onnxruntime transposes a weight at loading only where one product reads it: each further one gets its own
        for node in products[1:]:
            own = f"{weight.name}.{node.output[0]}"
            nodes.append(helper.make_node("DequantizeLinear", inputs, [own], name=own, axis=0))
            nodes.append(helper.make_node("Transpose", [own], [f"{own}.t"], name=f"{own}.t", perm=[1, 0]))
            node.input[1] = f"{own}.t"
    if readers or not layers:
        column, name = f"{weight.name}.column", f"{weight.name}.product" if layers else weight.name
        shape = (-1, *[1] * (weight.codes.ndim - 1))
        graph.initializer.append(numpy_helper.from_array(weight.step.reshape(shape), column))
        cast, product = f"{weight.name}.cast", f"{weight.name}.flat" if weight.grouped else name
        nodes.append(helper.make_node("Cast", [codes], [cast], name=cast, to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [cast, column], [product], name=f"{weight.name}.product"))
        if weight.grouped:
            nodes.append(helper.make_node("Reshape", [product, f"{weight.name}.shape"], [name], name=f"{name}.shaped"))
        for node in readers:
            node.input[:] = [name if each == weight.name else each for each in node.input]
    return nodes


def _quantize_bias(graph: GraphProto, layer: _Layer, step: float) -> list[NodeProto]:
    """Give a layer its bias in int32, at the product of the steps of input and weight."""
    from onnx import helper, numpy_helper

    if layer.bias is None:
        return []
    own = layer.node.input[2]
    name = own if len(users_of(graph)[own]) == 1 else f"{own}.{layer.node.output[0]}"
    scale = np.float32(step) * layer.weight.step
    codes = np.rint(layer.bias / scale.astype(np.float64)).astype(np.int32)
    if name == own:
        graph.initializer.remove(next(entry for entry in graph.initializer if entry.name == own))
    inputs = [f"{name}.int32", f"{name}.int32.scale"]
    graph.initializer.append(numpy_helper.from_array(codes, inputs[0]))
    graph.initializer.append(numpy_helper.from_array(scale, inputs[1]))
    layer.node.input[2] = name
    return [helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.float", axis=0)]
