"""Small networks on their grids, and plain readings of an ONNX file, for the tests of the format."""

import random
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_xai_compress.formats.onnx import check_onnx, write_onnx
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask

from traced_nets import Reused, cnn

INTEGERS = {onnx.TensorProto.INT2: 2, onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}


STORED = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def quantize(model, *, widths, float_layers=()):
    """Put the weights of all Linear and Conv layers onto a symmetric grid per output channel, and say so in a plan."""
    draw = random.Random(0)
    keep, bits, scales, sizes = {}, {}, {}, {}
    wanted = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))}
    wanted |= {id(m.in_proj_weight) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, weight in model.named_parameters():
        if id(weight) not in wanted or name in float_layers:
            continue
        bits[name] = torch.tensor([draw.choice(widths) for _ in range(len(weight))], dtype=torch.uint8)
        limit = 2.0 ** (bits[name].float() - 1) - 1
        scales[name] = (weight.detach().flatten(1).abs().amax(dim=1) / limit * 1.01).bfloat16().float()
        step = scales[name].reshape(-1, *[1] * (weight.dim() - 1))
        limit = limit.reshape(step.shape)
        with torch.no_grad():
            codes = torch.where(step > 0, weight / step, torch.zeros(())).round().clamp(-limit, limit)
            weight.copy_(codes * step)
        keep[name] = torch.ones_like(weight, dtype=torch.bool)
        sizes[name] = weight[0].numel()
    return CompressionPlan(Mask(keep), BitAllocation(bits, sizes), scales)


def export(model, plan, path, examples):
    write_onnx(model, plan, path, examples)
    return check_onnx(path, model, examples)


def plain_output(path, *tensors):
    """First output of the file under onnxruntime's default options."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})[0]


def decode(path):
    """Weights of a file from its raw bytes: an independent reading of what the ONNX standard says."""
    graph = onnx.load(path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    values = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            assert [(entry.name, entry.i) for entry in node.attribute] == [("axis", 0)]
            integers, scales = (stored[name] for name in node.input)  # no zero point
            width = INTEGERS[integers.data_type]
            binary = "".join(f"{byte:08b}"[::-1] for byte in integers.raw_data)
            count = int(np.prod(integers.dims))
            digits = [binary[start : start + width][::-1] for start in range(0, count * width, width)]
            codes = [int(text, 2) - (2**width if text[0] == "1" else 0) for text in digits]
            step = np.frombuffer(scales.raw_data, "<f4").reshape(-1, *[1] * (len(integers.dims) - 1))
            values[node.output[0]] = np.array(codes, np.float32).reshape(integers.dims) * step
        elif node.op_type == "Concat" and set(node.input) <= values.keys():
            values[node.output[0]] = np.concatenate([values[name] for name in node.input])
        elif node.op_type == "Gather" and node.input[1] in stored and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]][np.frombuffer(stored[node.input[1]].raw_data, "<i4")]
        elif node.op_type == "Reshape" and node.input[1] in stored and node.input[0] in values:
            sizes = np.frombuffer(stored[node.input[1]].raw_data, "<i8")
            values[node.output[0]] = values[node.input[0]].reshape(sizes)
    return values


def storage(path):
    """Integer types and numbers of rows of every weight."""
    found = {}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type in INTEGERS:
            assert tensor.name.endswith(f".int{INTEGERS[tensor.data_type]}")
            found.setdefault(tensor.name.rpartition(".")[0], {})[INTEGERS[tensor.data_type]] = tensor.dims[0]
    return found


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, query, memory):
        return self.cross(query, memory, memory)[0]


NETWORKS = {
    "cnn": (cnn, (torch.randn(3, 3, 8, 8),)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)), (torch.randn(3, 6),)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)), (torch.randn(3, 5, 6),)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(3, 5, 8),)),
    "attention": (Attention, (torch.randn(3, 5, 8), torch.randn(3, 4, 8))),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 7, 3), nn.ReLU(), nn.Conv1d(7, 4, 3)), (torch.randn(3, 3, 9),)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 5, 2), nn.ReLU()), (torch.randn(3, 2, 3, 4, 5),)),
    "reused": (Reused, (torch.randint(0, 11, (3, 5)),)),
}


def fused_weights(model):
    """Weights of a Sequential's convolutions and linear layers and the norm after each, fused by torch itself."""
    fused = {}
    layers = list(model.named_children()) if isinstance(model, nn.Sequential) else []
    for (name, layer), (_, norm) in pairwise(layers):
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv1d)):
            fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
            fused[f"{name}.weight"] = fuse(layer.eval(), norm.eval()).weight.detach().numpy()
    return fused


def stored_codes(path, name):
    """Integer codes of a weight, in the order of its channels."""
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}
    parts = [stored[f"{name}.int{width}"] for width in (2, 4, 8) if f"{name}.int{width}" in stored]
    codes = np.concatenate([part.astype(np.int64) for part in parts])
    return codes[stored[f"{name}.order"]] if f"{name}.order" in stored else codes
