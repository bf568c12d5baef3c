"""Integer weights in an ONNX graph, and the nodes that let onnxruntime find them as 8-bit ones.

onnxruntime builds integer kernels where one DequantizeLinear of 8-bit codes stands before a layer. So the stored 2-, 4-
and 8-bit codes are cast to 8 bits, joined and put into order by nodes that it folds when it loads the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_xai_compress.formats.codes import pack_codes, unpack_codes

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = ["StoredWeight", "find_weights"]


@dataclass
class StoredWeight:
    """A weight as it stands in the graph.

    Args:
        name: Of the dequantized weight.
        parts: Storage width -> rows of that width, by their place in the weight, in the order of the file.
        codes: int8, rows in the order of the weight.
        step: float32 step of each row.
        nodes: What dequantizes it now.
        grouped: Whether a channel has several rows, which the graph puts into the shape of the weight.
    """

    name: str
    parts: dict[int, NDArray[np.int64]]
    codes: NDArray[np.int8]
    step: NDArray[np.float32]
    nodes: list[NodeProto]
    grouped: bool = False

    def restep(self, step: NDArray[np.float32]) -> None:
        """Change the steps; where they are the old ones, or these with another sign, values stay the same."""
        shape = (-1, *[1] * (self.codes.ndim - 1))
        factor = (self.step.astype(np.float64) / step).reshape(shape)
        self.codes = np.rint(self.codes * factor).astype(np.int8)
        self.step = step

    def build(self, graph: GraphProto) -> tuple[list[NodeProto], str]:
        """Write the codes back and drop the old scales.

        Returns:
            Nodes that join the codes, and the name of the int8 tensor that they give.
        """
        from onnx import TensorProto, helper

        types = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}
        stored = {entry.name: entry for entry in graph.initializer}
        nodes, joined = [], []
        for width, rows in self.parts.items():
            source = f"{self.name}.int{width}"
            stored[source].raw_data = pack_codes(torch.from_numpy(self.codes[rows]), width).tobytes()
            graph.initializer.remove(stored[f"{source}.scale"])
            if types[width] != TensorProto.INT8:
                cast = f"{source}.cast"
                nodes.append(helper.make_node("Cast", [source], [cast], name=cast, to=TensorProto.INT8))
                source = cast
            joined.append(source)
        codes = joined[0]
        if len(joined) > 1:
            codes = f"{self.name}.rows"
            nodes.append(helper.make_node("Concat", joined, [codes], name=codes, axis=0))
        if f"{self.name}.order" in stored:
            codes = f"{self.name}.codes"
            nodes.append(helper.make_node("Gather", [nodes[-1].output[0], f"{self.name}.order"], [codes], name=codes))
        return nodes, codes


def find_weights(graph: GraphProto) -> dict[str, StoredWeight]:
    """Find the weights that `quantize_input` put into a graph, by name; without those that are not of float32."""
    from onnx import numpy_helper

    stored = {entry.name: entry for entry in graph.initializer}
    makers = {node.name: node for node in graph.node if node.name}
    found: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.name.endswith(".float"):
            name = node.name.removesuffix(".float").rpartition(".int")[0]
            found.setdefault(name, []).append(node)
    weights = {}
    for name, nodes in found.items():
        ends = [makers[f"{name}.{end}"] for end in ("rows", "sorted", "shaped", "cast") if f"{name}.{end}" in makers]
        if any(node.op_type == "Cast" for node in ends):
            continue
        codes, steps, parts, start = [], [], {}, 0
        for node in nodes:
            integers, scales = (stored[entry] for entry in node.input)
            width = int(integers.name.rpartition(".int")[2])
            codes.append(unpack_codes(integers.raw_data, width, int(np.prod(integers.dims))).reshape(integers.dims))
            steps.append(numpy_helper.to_array(scales))
            parts[width] = np.arange(start, start + len(codes[-1]))
            start += len(codes[-1])
        rows = np.arange(start)
        order = numpy_helper.to_array(stored[f"{name}.order"]) if f"{name}.order" in stored else rows
        place = np.argsort(order)  # of each row in the file
        weights[name] = StoredWeight(
            name,
            {width: place[members] for width, members in parts.items()},
            np.concatenate(codes)[order],
            np.concatenate(steps)[order],
            [*nodes, *ends],
            grouped=f"{name}.shaped" in makers,
        )
    return weights
