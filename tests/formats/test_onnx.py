"""The ONNX file: integer weights that decode to the model's own, outputs equal."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_xai_compress.formats.onnx import TOLERANCE, write_onnx
from lightning_xai_compress.formats.registry import FORMATS, Inputs
from lightning_xai_compress.plan import CompressionPlan, Mask

from onnx_nets import NETWORKS, STORED, decode, export, fused_weights, operators, plain_output, quantize, storage
from traced_nets import cnn

onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize("network", NETWORKS)
def test_the_file_holds_the_weights_and_gives_the_outputs_of_the_model(tmp_path, network):
    build, tensors = NETWORKS[network]
    model = build()
    plan = quantize(model, widths=(2, 3, 4, 6, 8))
    path = tmp_path / "model.onnx"

    difference = export(model, plan, path, [Inputs(tensors)])

    assert 0 <= difference < 2e-6
    decoded = decode(path)
    fused = fused_weights(model)  # BatchNorm is folded into the scales
    for name, weight in model.named_parameters():
        if name in fused:
            np.testing.assert_allclose(decoded[name], fused[name], rtol=1e-6)
        elif name in plan.scales:
            np.testing.assert_array_equal(decoded[name], weight.detach().numpy())
    with torch.no_grad():
        expected = model.eval()(*tensors).numpy()
    np.testing.assert_allclose(plain_output(path, *tensors), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_padding_masks_are_exported(tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    example = Inputs((torch.randn(2, 3, 8),), {"src_key_padding_mask": padding})

    assert export(model, quantize(model, widths=(2, 8)), tmp_path / "m.onnx", [example]) < 2e-6


@pytest.mark.parametrize("width", STORED)
def test_each_width_has_its_storage_type(tmp_path, width):
    model = nn.Sequential(nn.Linear(7, 5))  # 7 and 5: rows that do not fill their bytes
    path = tmp_path / "model.onnx"

    export(model, quantize(model, widths=(width,)), path, [Inputs((torch.randn(2, 7),))])

    assert storage(path) == {"0.weight": {STORED[width]: 5}}
    assert operators(path) == ["DequantizeLinear", "Gemm"]
    np.testing.assert_array_equal(decode(path)["0.weight"], model[0].weight.detach().numpy())
    proto = onnx.load(path)
    assert (proto.opset_import[0].version, proto.ir_version) == ((25, 13) if width == 2 else (21, 10))


def test_mixed_widths_are_split_by_type_and_put_back_into_order(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 4, 3))
    plan = quantize(model, widths=(2,))
    plan.allocation.bits["0.weight"].copy_(torch.tensor([8, 2, 5, 3]))  # wider is still on the grid
    path = tmp_path / "model.onnx"

    export(model, plan, path, [Inputs((torch.randn(2, 2, 5, 5),))])

    assert storage(path) == {"0.weight": {2: 1, 4: 1, 8: 2}}
    assert operators(path) == [*["DequantizeLinear"] * 3, "Concat", "Gather", "Conv"]
    np.testing.assert_array_equal(decode(path)["0.weight"], model[0].weight.detach().numpy())


def test_rows_that_are_in_order_already_are_not_gathered(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    plan = quantize(model, widths=(2,))
    plan.allocation.bits["0.weight"].copy_(torch.tensor([2, 4, 8]))
    path = tmp_path / "model.onnx"

    export(model, plan, path, [Inputs((torch.randn(2, 2, 5, 5),))])

    assert operators(path) == [*["DequantizeLinear"] * 3, "Concat", "Conv"]


def test_matrix_products_are_exact_under_default_options(tmp_path):
    model = nn.Sequential(nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 32))
    tokens = torch.randn(2, 20, 256)
    path = tmp_path / "model.onnx"

    export(model, quantize(model, widths=(8,)), path, [Inputs((tokens,))])

    expected = model(tokens).detach().numpy()
    np.testing.assert_allclose(plain_output(path, tokens), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_dead_channels_are_zero_codes(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[1] = 0
    plan = quantize(model, widths=(4,))
    path = tmp_path / "model.onnx"

    export(model, plan, path, [Inputs((torch.randn(2, 6),))])

    assert plan.scales["0.weight"][1] == 0
    np.testing.assert_array_equal(decode(path)["0.weight"], model[0].weight.detach().numpy())


def test_layers_without_an_allocation_stay_float(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    path = tmp_path / "model.onnx"

    export(model, quantize(model, widths=(4,), float_layers=["2.weight"]), path, [Inputs((torch.randn(2, 6),))])

    assert storage(path) == {"0.weight": {4: 5}}
    floats = {entry.name for entry in onnx.load(path).graph.initializer if entry.data_type == onnx.TensorProto.FLOAT}
    assert floats == {"0.weight.int4.scale", "0.bias", "2.weight", "2.bias"}


def test_a_plan_without_quantization_gives_a_float_file(tmp_path):
    model = cnn()
    mask = Mask({"0.weight": torch.ones_like(model[0].weight, dtype=torch.bool)})

    difference = export(model, CompressionPlan(mask), tmp_path / "m.onnx", [Inputs((torch.randn(2, 3, 8, 8),))])

    assert difference < 2e-6
    assert storage(tmp_path / "m.onnx") == {}


def test_the_file_is_as_large_as_its_packed_bits(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 84, 3))
    plan = quantize(model, widths=(2, 3, 4, 6, 8))
    path = tmp_path / "model.onnx"

    export(model, plan, path, [Inputs((torch.randn(1, 3, 9, 9),))])

    rows = {name: [STORED[width] for width in bits.tolist()] for name, bits in plan.allocation.bits.items()}
    packed = sum(sum(widths) * plan.allocation.channel_size[name] for name, widths in rows.items()) / 8
    scales = sum(4 * len(widths) for widths in rows.values())
    rest = sum(2 * 4 * len(widths) for widths in rows.values())  # biases and the order of the rows
    assert sum(len(widths) * plan.allocation.channel_size[name] for name, widths in rows.items()) > 340_000
    assert packed + scales + rest < path.stat().st_size < packed + scales + rest + 4096


def test_the_format_is_registered():
    assert FORMATS["onnx"].write is write_onnx
    assert FORMATS["onnx"].filename == "model.onnx"
    assert (FORMATS["onnx"].needs, FORMATS["onnx"].extra) == (("onnx", "onnxscript", "onnxruntime"), "onnx")
