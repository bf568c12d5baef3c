"""Groups of input channels in the ONNX file: a scale a row, and a Reshape that onnxruntime folds when it loads."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.onnx import TOLERANCE, check_onnx, onnx_session, read_onnx, write_onnx
from lightning_xai_compress.formats.registry import Files, Inputs

from grouped_nets import NETWORKS, mlp, on_groups
from onnx_nets import decode, fused_weights, operators, plain_output, storage
from traced_nets import cnn


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE / 10 * np.abs(expected).max())


@pytest.mark.parametrize("network", ["cnn", "channels_last", "mlp", "tokens", "transposed", "embedding"])
def test_the_file_holds_the_weights_and_gives_the_outputs_of_the_model(tmp_path, network):
    build, tensors = NETWORKS[network]
    model = build().eval()
    plan = on_groups(model, sparsity=0.0 if network in ("cnn", "tokens") else 0.7)
    path = tmp_path / "model.onnx"
    write_onnx(model, plan, path, [Inputs(tensors)])

    assert check_onnx(path, model, [Inputs(tensors)]) < 2e-6

    decoded, fused = decode(path), fused_weights(model)
    contents = {entry.name: entry for entry in read_onnx(path).tensors}
    for name in plan.scales:
        for weight in (decoded[name], contents[name].values.numpy()):
            if name in fused:
                np.testing.assert_allclose(weight, fused[name], rtol=2e-6)
            else:
                np.testing.assert_array_equal(weight, model.get_parameter(name).detach().numpy())
        assert sum(contents[name].bits.values()) == len(plan.allocation[name])
    with torch.no_grad():
        expected = model(*tensors).numpy()
    close(plain_output(path, *tensors), expected)  # default options
    session = onnx_session(path)
    feed = dict(zip([entry.name for entry in session.get_inputs()], tensors, strict=True))
    close(session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})[0], expected)
    held = sum(len(entry.raw_data) for entry in onnx.load(path).graph.initializer)
    assert sum(entry.bytes for entry in contents.values()) == held


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_each_type_runs_with_a_scale_a_group(tmp_path, width):
    model = nn.Sequential(nn.Linear(12, 5))
    path = tmp_path / "m.onnx"
    write_onnx(model, on_groups(model, widths=(width,)), path, [Inputs((torch.randn(2, 12),))])

    assert check_onnx(path, model, [Inputs((torch.randn(3, 12),))]) < 2e-6
    assert storage(path) == {"0.weight": {{2: 2, 3: 4, 4: 4, 8: 8}[width]: 20}}
    assert operators(path) == ["DequantizeLinear", "Reshape", "Gemm"]
    np.testing.assert_array_equal(decode(path)["0.weight"], model[0].weight.detach().numpy())


def test_one_row_a_channel_needs_no_reshape(tmp_path):
    model = nn.Sequential(nn.Linear(12, 5))
    write_onnx(model, on_groups(model, groups=(1,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 12),))])

    assert "Reshape" not in operators(tmp_path / "m.onnx")


def test_onnxruntime_folds_the_groups_at_loading(tmp_path):
    model = cnn().eval()
    path = tmp_path / "m.onnx"
    write_onnx(model, on_groups(model), path, [Inputs((torch.randn(2, 3, 8, 8),))])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # as onnx_session does
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")

    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    left = operators(tmp_path / "optimized.onnx")
    assert operators(path).count("DequantizeLinear") >= 4
    assert not {"DequantizeLinear", "Concat", "Gather"} & set(left)
    assert left.count("Reshape") <= 1  # that of Flatten


def test_matrix_products_are_exact_under_default_options(tmp_path):
    model = nn.Sequential(nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 32))
    tokens = torch.randn(2, 20, 256)
    path = tmp_path / "model.onnx"
    write_onnx(model, on_groups(model, widths=(8,)), path, [Inputs((tokens,))])

    close(plain_output(path, tokens), model(tokens).detach().numpy())


def test_with_8_bit_activations_layers_with_groups_stay_float_and_are_named(tmp_path):
    model = cnn().eval()  # the depthwise convolution alone has no groups
    x = torch.randn(4, 3, 8, 8)
    plan, path = on_groups(model), tmp_path / "m.onnx"

    with pytest.warns(UserWarning, match="8-bit activations: ") as caught:
        write_onnx(model, plan, path, [Inputs((x,))], Files(activations="int8"))

    told = str(caught[0].message)
    for name, kind in (("0.weight", "Conv"), ("6.weight", "Conv"), ("9.weight", "Gemm")):
        assert f"{name} stays float in {kind}, which has no integer kernel for groups of input channels" in told
    assert "3.weight" not in told
    contents = {entry.name: entry for entry in read_onnx(path).tensors}
    for name in ("6.weight", "9.weight"):
        np.testing.assert_array_equal(contents[name].values.numpy(), model.get_parameter(name).detach().numpy())
        assert sum(contents[name].bits.values()) == len(plan.allocation[name])
    np.testing.assert_allclose(contents["0.weight"].values.numpy(), fused_weights(model)["0.weight"], rtol=2e-6)
    assert operators(path).count("QuantizeLinear") > 0
    assert 0 < check_onnx(path, model, [Inputs((x,))], Files(activations="int8")) < 0.05


def test_8_bit_activations_of_nothing_but_groups_are_refused(tmp_path):
    model = mlp()

    with pytest.raises(ArtifactError, match=r"has no layer that onnxruntime runs on integers .*0\.weight stays float"):
        write_onnx(
            model, on_groups(model), tmp_path / "m.onnx", [Inputs((torch.randn(3, 12),))], Files(activations="int8")
        )
