"""Where an ONNX graph goes over to 8-bit activations and back: what to quantize, and the nodes that do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = ["Place", "find_places", "insert_places", "replace_nodes", "users_of"]

_MOVES = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
_COMPUTES = ("Add", "Mul", "GlobalAveragePool", "AveragePool", "Concat", "Sigmoid", "LeakyRelu")


@dataclass(frozen=True)
class Place:
    """A tensor that is quantized.

    Args:
        tensor: Its name.
        readers: First outputs of the nodes that read it from the 8-bit grid; None: all that read it.
        like: Tensor whose grid it lies on, since its values are taken from there; None: it has its own.
    """

    tensor: str
    readers: frozenset[str] | None
    like: str | None = None


def users_of(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Nodes that read each value; a node that reads it twice stands there twice."""
    users: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def find_places(graph: GraphProto, layers: Sequence[NodeProto], kept: set[str]) -> list[Place]:
    """Find what to quantize around layers that run on integers.

    Every layer reads its first input from an 8-bit grid. A convolution also writes to one (it has no kernel that writes
    floats), a matrix product only where what follows goes on with integers. In between, operations stay on integers
    where all that they read is there already and some layer wants what they write.

    Args:
        graph: Float graph.
        layers: Nodes that will run on integers.
        kept: Values that something outside of the graph's own nodes reads.

    Returns:
        Places, in the order of the graph.
    """
    rectifiers = _rectifiers(graph)
    candidates = rectifiers | {
        node.output[0] for node in graph.node if node.op_type in (*_MOVES, *_COMPUTES) and len(node.output) == 1
    }
    while True:  # an operation that turns out to stay float no longer wants its inputs on a grid
        places, integer = _sweep(graph, {node.output[0]: node for node in layers}, kept, candidates, rectifiers)
        if integer == candidates:
            return places
        candidates = integer


def _rectifiers(graph: GraphProto) -> set[str]:
    """Outputs of what a grid from zero upwards does by itself: Relu, and Clip from zero to some value."""
    from onnx import numpy_helper

    scalars = [entry for entry in graph.initializer if not entry.dims]
    from_zero = {entry.name for entry in scalars if not numpy_helper.to_array(entry).any()}
    return {
        node.output[0]
        for node in graph.node
        if node.op_type == "Relu" or (node.op_type == "Clip" and from_zero.issuperset(node.input[1:2] or [""]))
    }


def _sweep(
    graph: GraphProto, layers: Mapping[str, NodeProto], kept: set[str], candidates: set[str], rectifiers: set[str]
) -> tuple[list[Place], set[str]]:
    """Place with a given set of operations that might run on integers; returns also those that do."""
    users = users_of(graph)
    entries = {node.input[0] for node in layers.values()}
    wanted = set(entries)
    for node in reversed(graph.node):
        if node.output[0] in candidates & wanted:
            wanted.update(_data(node))
    on_grid, pending, integer = set(entries), set(), set()
    whole: dict[str, str | None] = {}
    for node in graph.node:
        name, data = node.output[0], _data(node)
        if name in rectifiers:
            writes = data[0] in pending
        elif name in layers:
            writes = node.op_type == "Conv" or name in wanted
        else:
            writes = name in candidates & wanted and on_grid.issuperset(data)
        if not writes:
            continue
        if name in candidates:
            integer.add(name)
        following = users.get(name, [])
        if name not in kept and [each.output[0] in rectifiers for each in following] == [True]:
            pending.add(name)  # the grid of what the rectifier leaves does its work
        else:
            on_grid.add(name)
            whole[name] = data[0] if node.op_type in _MOVES else None
    takers = layers.keys() | integer
    places = []
    for name in (*(entry.name for entry in graph.input), *(out for node in graph.node for out in node.output)):
        if name in whole:
            places.append(Place(name, None, whole[name]))
        elif name in entries:
            readers = frozenset(user.output[0] for user in users[name] if user.output[0] in takers)
            places.append(Place(name, readers))
    return places, integer


def _data(node: NodeProto) -> list[str]:
    """What a node computes with: without shapes, axes and bounds."""
    single = node.op_type in (*_MOVES, "Relu", "Clip")
    return [name for name in (node.input[:1] if single else node.input) if name]


def insert_places(
    graph: GraphProto, places: Sequence[Place], grids: Mapping[str, tuple[np.float32, np.uint8]], kept: set[str]
) -> None:
    """Put a quantizing and a dequantizing node at every place, named after the tensor.

    Args:
        graph: Graph to edit.
        places: From `find_places`.
        grids: Step and zero point of each tensor that has a grid of its own.
        kept: Values whose names must stay with what is read from outside.
    """
    from onnx import helper, numpy_helper

    users = users_of(graph)
    makers = {output: node for node in graph.node for output in node.output}
    after: dict[str, list[NodeProto]] = {}
    sources: dict[str, str] = {}
    for place in places:
        name = place.tensor
        source = sources[name] = sources[place.like] if place.like is not None else name
        scale, zero = f"{source}.quantized.scale", f"{source}.quantized.zero_point"
        if source == name:
            graph.initializer.append(numpy_helper.from_array(np.asarray(grids[name][0]), scale))
            graph.initializer.append(numpy_helper.from_array(np.asarray(grids[name][1]), zero))
        before, dequantized = name, f"{name}.dequantized"
        if name in kept and place.readers is None:
            before, dequantized = f"{name}.float", name
            maker = makers[name]
            maker.output[:] = [before if output == name else output for output in maker.output]
        else:
            for user in users.get(name, ()):
                if place.readers is None or user.output[0] in place.readers:
                    user.input[:] = [dequantized if each == name else each for each in user.input]
        codes = f"{name}.quantized"
        after[before] = [
            helper.make_node("QuantizeLinear", [before, scale, zero], [codes], name=codes),
            helper.make_node("DequantizeLinear", [codes, scale, zero], [dequantized], name=f"{name}.dequantized"),
        ]
    nodes = [node for entry in graph.input for node in after.get(entry.name, ())]
    for node in graph.node:
        nodes.append(node)
        nodes += [each for output in node.output for each in after.get(output, ())]
    replace_nodes(graph, nodes)


def replace_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Give a graph these nodes, in this order."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
