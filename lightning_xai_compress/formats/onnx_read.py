"""What an ONNX file holds, read from its bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.codes import unpack_codes
from lightning_xai_compress.formats.registry import Contents, Stored

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto

__all__ = ["read_onnx"]

_DECODING = {"Add", "Cast", "Concat", "DequantizeLinear", "Gather", "Mul", "Reshape"}


def read_onnx(path: Path) -> Contents:
    """Tell what a file holds: its weights dequantized, with BatchNorm where that was folded into them.

    Raises:
        FileNotFoundError: No such file.
        ArtifactError: It is no ONNX file, or damaged.
    """
    import onnx

    data = Path(path).read_bytes()
    try:
        proto = onnx.ModelProto.FromString(data)
        onnx.checker.check_model(proto)
        tensors = _tensors(proto.graph)
    except Exception as error:  # protobuf and the checker raise types of their own
        raise ArtifactError(f"{path} is damaged or no ONNX file: {error}; copy it again, or export it again") from error
    return Contents(tensors, {entry.key: entry.value for entry in proto.metadata_props})


def _tensors(graph: GraphProto) -> tuple[Stored, ...]:
    """Dequantized weights by the graph's own nodes, then all other initializers."""
    integers = _integer_types()
    values: dict[str, NDArray[Any]] = {entry.name: _array(entry) for entry in graph.initializer}
    sizes = {entry.name: len(entry.raw_data) or values[entry.name].nbytes for entry in graph.initializer}
    sources: dict[str, set[str]] = {}  # constants that a value is computed from
    widths: dict[str, Counter[int]] = {}
    for entry in graph.initializer:
        if entry.data_type in integers and entry.name.endswith(f".int{integers[entry.data_type]}"):
            widths.setdefault(entry.name.rpartition(".")[0], Counter())[integers[entry.data_type]] += entry.dims[0]
        elif entry.data_type == entry.INT32 and entry.name.endswith(".int32"):  # a bias beside 8-bit activations
            widths.setdefault(entry.name.removesuffix(".int32"), Counter())
    for node in graph.node:
        inputs = [name for name in node.input if name]
        if node.op_type in _DECODING and all(name in values for name in inputs):
            values[node.output[0]] = _compute(node, [values[name] for name in inputs])
            sources[node.output[0]] = set().union(*(sources.get(name, {name}) for name in inputs))
    weights = [
        Stored(
            name,
            torch.from_numpy(values[name].copy()),
            dict(sorted(count.items())),
            sum(sizes[each] for each in sources[name]),
        )
        for name, count in widths.items()
    ]
    used = set().union(*(sources[name] for name in widths)) if widths else set()
    others = [
        Stored(entry.name, torch.from_numpy(values[entry.name].copy()), {}, sizes[entry.name])
        for entry in graph.initializer
        if entry.name not in used and values[entry.name].dtype != np.dtype("O")
    ]
    return (*weights, *others)


def _integer_types() -> dict[int, int]:
    from onnx import TensorProto

    return {TensorProto.INT2: 2, TensorProto.INT4: 4, TensorProto.INT8: 8}


def _array(entry: TensorProto) -> NDArray[Any]:
    from onnx import numpy_helper

    width = _integer_types().get(entry.data_type)
    if width is None or not entry.raw_data:
        return numpy_helper.to_array(entry)
    count = int(np.prod(entry.dims, dtype=np.int64))
    if len(entry.raw_data) != -(-count * width // 8):
        raise ValueError(f"{entry.name} has {len(entry.raw_data)} bytes for {count} numbers of {width} bits")
    return unpack_codes(entry.raw_data, width, count).reshape(entry.dims)


def _compute(node: Any, inputs: list[NDArray[Any]]) -> NDArray[Any]:
    from onnx import helper

    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    axis = attributes.get("axis", 0)
    if node.op_type == "Cast":
        return inputs[0].astype(helper.tensor_dtype_to_np_dtype(attributes["to"]))
    if node.op_type == "Concat":
        return np.concatenate(inputs, axis)
    if node.op_type == "Gather":
        return np.take(inputs[0], inputs[1], axis)
    if node.op_type == "Reshape":
        return inputs[0].reshape(inputs[1])
    if node.op_type == "Add":
        return np.asarray(inputs[0] + inputs[1])
    if node.op_type == "Mul":
        product: NDArray[Any] = inputs[0] * inputs[1]
        return product
    shape = [1] * inputs[0].ndim
    if inputs[1].size > 1 or inputs[0].ndim == 1:
        shape[axis] = -1
    zero = inputs[2].reshape(shape).astype(np.float32) if len(inputs) > 2 else np.float32(0)
    result: NDArray[Any] = (inputs[0].astype(np.float32) - zero) * inputs[1].reshape(shape)
    return result
