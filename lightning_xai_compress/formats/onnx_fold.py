"""What makes a traced graph faster without changing what it computes: BatchNorm folded, means as pooling.

BatchNorm goes into the layer before it: into the scales of its integer weights, and into its bias.

The codes stay as they are, so nothing is rounded anew: w = code * scale becomes code * (scale * g) with
g = gamma / sqrt(var + eps), and the bias (b - mean) * g + beta. Scales may so become negative, or zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_xai_compress.formats.onnx_graph import readers

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["fold_batchnorm", "pool_globally"]


def fold_batchnorm(graph: GraphProto, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold every BatchNormalization that directly follows the only use of a quantized Conv or Gemm weight.

    Args:
        graph: Graph to edit; quantized weights are still its inputs.
        scales: Step of each row by weight name, shape [rows]; a channel has one or several, one after the other.

    Returns:
        All scales, the folded ones changed, float32.
    """
    from onnx import numpy_helper

    constants = {entry.name: entry for entry in graph.initializer}
    outputs = {entry.name for entry in graph.output}
    users: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    makers = {output: node for node in graph.node for output in node.output}
    folded = dict(scales)
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        layer = makers.get(norm.input[0])
        if (
            layer is None
            or not _is_affine(layer)
            or layer.input[1] not in scales
            or len(users[layer.input[1]]) > 1
            or len(users[layer.output[0]]) > 1
            or layer.output[0] in outputs
            or any(output for output in norm.output[1:])
            or any(name not in constants for name in (*norm.input[1:], *layer.input[2:]))
        ):
            continue
        gamma, beta, mean, variance = (numpy_helper.to_array(constants[name]) for name in norm.input[1:])
        if gamma.dtype != np.float32:
            continue
        factor = gamma / np.sqrt(variance.astype(np.float64) + _attribute(norm, "epsilon", 1e-5))
        own = layer.input[2] if len(layer.input) > 2 else ""
        bias = numpy_helper.to_array(constants[own]) if own else np.zeros_like(mean)
        shifted = (bias.astype(np.float64) - mean) * factor + beta
        weight = layer.input[1]
        steps = folded[weight].detach().cpu().double().reshape(len(factor), -1)
        folded[weight] = (steps * torch.from_numpy(factor)[:, None]).float().reshape(-1)
        _set_bias(graph, layer, own, shifted.astype(np.float32), taken=set(users) | set(makers) | constants.keys())
        layer.output[0] = norm.output[0]
        graph.node.remove(norm)
    _drop_unused(graph)
    return folded


def _is_affine(layer: NodeProto) -> bool:
    """Whether rows of the weight are output channels, and the bias is added as it is."""
    if layer.op_type == "Conv":
        return True
    scaled = _attribute(layer, "alpha", 1.0) == 1.0 and _attribute(layer, "beta", 1.0) == 1.0
    return layer.op_type == "Gemm" and scaled and _attribute(layer, "transB", 0) == 1


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _set_bias(graph: GraphProto, layer: NodeProto, own: str, bias: NDArray[np.float32], taken: set[str]) -> None:
    """Give a layer its new bias: under the name of the one that it had, or under that of its weight."""
    from onnx import numpy_helper

    shared = sum(own in node.input for node in graph.node) > 1
    name = own if own and not shared else f"{layer.input[1].removesuffix('.weight')}.bias"
    while name != own and name in taken:
        name += "_"
    kept = [entry for entry in graph.initializer if entry.name != name]
    del graph.initializer[:]
    graph.initializer.extend([*kept, numpy_helper.from_array(bias, name)])
    layer.input[:] = [*layer.input[:2], name]


def _drop_unused(graph: GraphProto) -> None:
    """Remove the statistics of the norms that are gone."""
    kept = [entry for entry in graph.initializer if readers(graph, entry.name) or _is_output(graph, entry.name)]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _is_output(graph: GraphProto, name: str) -> bool:
    return any(entry.name == name for entry in graph.output)


def pool_globally(model: ModelProto) -> None:
    """Turn means over all positions into GlobalAveragePool, for which onnxruntime has kernels in its own layout, and in
    integers.

    A ReduceMean counts where it keeps its dimensions and takes all axes but the first two of three to five.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer if len(entry.dims) == 1}
    means = [
        node
        for node in graph.node
        if node.op_type == "ReduceMean" and len(node.input) == 2 and node.input[1] in constants
    ]
    if not means:
        return
    inferred = onnx.shape_inference.infer_shapes(model).graph
    ranks = {
        entry.name: len(entry.type.tensor_type.shape.dim)
        for entry in (*inferred.value_info, *inferred.input, *inferred.output)
        if entry.type.tensor_type.HasField("shape")
    }
    for node in means:
        rank = ranks.get(node.input[0], 0)
        axes = {int(axis) % rank for axis in constants[node.input[1]]} if rank else set()
        if 3 <= rank <= 5 and axes == set(range(2, rank)) and _attribute(node, "keepdims", 1) == 1:
            pool = helper.make_node("GlobalAveragePool", [node.input[0]], [node.output[0]], name=node.name)
            node.CopyFrom(pool)
    _drop_unused(graph)
