"""8-bit activations: integer kernels where onnxruntime has them, weights as they were, outputs close to the model's."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.onnx import onnx_session, read_onnx, write_onnx
from lightning_xai_compress.formats.onnx_int8 import quantize_activations
from lightning_xai_compress.formats.registry import Files, Inputs, save

from onnx_nets import NETWORKS, decode, operators, quantize
from traced_nets import Reused, cnn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

INT8 = Files(activations="int8")


def write(model, path, *tensors, widths=(2, 4, 8), activations="int8", ranges="minmax", plan=None):
    plan = plan or quantize(model, widths=widths)
    write_onnx(model, plan, path, [Inputs(tensors)], Files(activations=activations, ranges=ranges))
    return path


def session(path, *, optimized=None, plain=False):
    """The file under onnxruntime's default options, or without any optimization."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, *tensors, **settings):
    opened = session(path, **settings)
    feed = {entry.name: tensor.numpy() for entry, tensor in zip(opened.get_inputs(), tensors, strict=True)}
    return opened.run(None, feed)


def kernels(path):
    """What onnxruntime makes of the file: numbers of its operators."""
    optimized = path.with_suffix(".optimized.onnx")
    session(path, optimized=optimized)
    return Counter(node.op_type for node in onnx.load(optimized).graph.node)


def values(path, names, *tensors):
    """Values from the middle of the graph, by onnxruntime without optimization."""
    proto = onnx.load(path)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    probe = path.with_suffix(".probe.onnx")
    onnx.save(proto, probe)
    return dict(zip(names, run(probe, *tensors, plain=True)[-len(names) :], strict=True))


def error(got, expected):
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


class Residual(nn.Module):
    """What stays on integers between convolutions: sums, rectifiers, pooling, joining, and what only moves values."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 16, 3, padding=1)
        self.right = nn.Conv2d(16, 16, 1)
        self.mix = nn.Conv2d(32, 16, 1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16 * 4 * 4, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(self.left(x) + x)
        x = self.mix(torch.cat([nn.functional.relu6(self.right(x)), x], dim=1))
        return self.head(torch.relu(self.fc(torch.nn.functional.avg_pool2d(x, 2).flatten(1))))


def test_everything_between_the_layers_of_a_convolutional_network_runs_on_integers(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)

    found = kernels(write(Residual(), tmp_path / "m.onnx", x))

    layout = {"Transpose", "Reshape"}
    assert {name: count for name, count in found.items() if name not in layout} == {
        "QuantizeLinear": 1,
        "QLinearConv": 4,
        "QGemm": 2,
        "QLinearAdd": 1,
        "QLinearConcat": 1,
        "QLinearAveragePool": 1,
        "NhwcMaxPool": 1,
    }


LAYERS = {
    "cnn": {"QLinearConv": 3, "QGemm": 1},
    "mlp": {"QGemm": 2},
    "tokens": {"MatMulIntegerToFloat": 2},
    "encoder": {"MatMulIntegerToFloat": 3, "QGemm": 1},
    "attention": {"QGemm": 1},  # its other weight is split into those of queries and of memory
    "conv1d": {"QLinearConv": 2},
    "conv3d": {"QLinearConv": 1},
    "reused": {"MatMulIntegerToFloat": 3},
}


@pytest.mark.parametrize("network", NETWORKS)
def test_layers_become_integer_kernels_and_give_about_the_outputs_of_the_model(tmp_path, network):
    build, tensors = NETWORKS[network]
    torch.manual_seed(0)
    model = build().eval()

    path = write(model, tmp_path / "m.onnx", *tensors)

    found = kernels(path)
    assert {name: found[name] for name in found if name in ("QLinearConv", "QGemm", "MatMulIntegerToFloat")} == (
        LAYERS[network]
    )
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "Cast"} & set(found)
    assert found["DequantizeLinear"] <= 1  # of an output: no weight is dequantized in a run
    with torch.no_grad():
        assert 0 < error(run(path, *tensors)[0], model(*tensors)) < 0.03


@pytest.mark.parametrize("network", ["cnn", "mlp", "tokens", "conv1d"])
def test_kernels_compute_what_the_standard_says_of_the_graph(tmp_path, network):
    build, tensors = NETWORKS[network]
    path = write(build(), tmp_path / "m.onnx", *tensors, widths=(4, 8))

    expected = onnx.reference.ReferenceEvaluator(str(path)).run(None, {"input": tensors[0].numpy()})[0]

    got = run(path, *tensors)[0]
    assert np.abs(got - expected).max() <= 2 * np.abs(expected).max() / 255


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_keep_their_values(tmp_path, network):
    build, tensors = NETWORKS[network]
    model = build()
    plan = quantize(model, widths=(2, 3, 4, 6, 8))
    plain = write(model, tmp_path / "plain.onnx", *tensors, activations=None, plan=plan)

    path = write(model, tmp_path / "m.onnx", *tensors, plan=plan)

    expected = {name: weight for name, weight in decode(plain).items() if name in plan.scales}
    found = values(path, list(expected), *tensors)
    listed = {entry.name: entry for entry in read_onnx(path).tensors}
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight)
        np.testing.assert_array_equal(listed[name].values.numpy(), weight)
        assert sum(listed[name].bits.values()) == len(weight)


def test_scales_below_zero_become_positive(tmp_path):
    model = cnn()
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-1, 1, 8))
    x = torch.randn(3, 3, 8, 8)
    plan = quantize(model, widths=(4,))

    path = write(model, tmp_path / "m.onnx", x, plan=plan)

    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}
    scales = [value for name, value in stored.items() if name.endswith(".scale")]
    assert len(scales) > 8
    assert all((value > 0).all() for value in scales)
    assert error(run(path, x)[0], model.eval()(x)) < 0.03


def test_a_bias_that_int32_cannot_hold_at_the_step_widens_it(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[1] *= 1e-12
        model[0].weight[2] = 0
        model[0].bias.copy_(torch.tensor([0.1, 1.0, 2.0]))
    x = torch.randn(4, 2, 4, 4)
    plan = quantize(model, widths=(8,))
    path = write(model, tmp_path / "plain.onnx", x, plan=plan, activations=None)
    proto = onnx.load(path)

    notes = quantize_activations(proto, [{"input": x.numpy()}])

    onnx.save(proto, tmp_path / "m.onnx")
    assert notes == ["0.weight: wider steps in 1 channels, whose bias is large beside them"]
    found = values(tmp_path / "m.onnx", ["0.weight", "0.bias"], x)
    np.testing.assert_allclose(found["0.weight"], model[0].weight.detach().numpy(), rtol=0, atol=1e-7)
    np.testing.assert_array_equal(found["0.weight"][[0, 2]], model[0].weight[[0, 2]].detach().numpy())
    np.testing.assert_allclose(found["0.bias"], [0.1, 1, 2], rtol=1e-3)
    assert error(run(tmp_path / "m.onnx", x)[0], model(x)) < 0.03


def test_a_weight_that_a_float_operation_reads_too_is_decoded_once(tmp_path):
    model = Reused()
    tokens = torch.arange(11).reshape(1, 11)
    plan = quantize(model, widths=(2, 4))
    proto = onnx.load(write(model, tmp_path / "plain.onnx", tokens, plan=plan, activations=None))

    notes = quantize_activations(proto, [{"tokens": tokens.numpy()}])

    onnx.save(proto, tmp_path / "m.onnx")
    tied = next(name for name in plan.scales if "embed" in name)
    assert notes == [f"{tied} stays float in Gather, which has no integer kernel for it"]
    found = kernels(tmp_path / "m.onnx")
    assert (found["MatMulIntegerToFloat"], found["Gather"], found["Mul"], found["DequantizeLinear"]) == (3, 1, 0, 0)
    assert error(run(tmp_path / "m.onnx", tokens)[0], model(tokens)) < 0.05


class Branches(nn.Module):
    """A convolution that other outputs, other operations and a later layer read."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.second = nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 2, 2)

    def forward(self, x):
        hidden = self.first(x)
        return hidden, self.up(self.second(torch.relu(hidden))), hidden.exp()


def test_values_that_are_outputs_keep_their_names_and_come_from_the_same_kernels(tmp_path):
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(3, 2, 6, 6)
    plan = quantize(model, widths=(4, 8))
    plain = write(model, tmp_path / "plain.onnx", x, plan=plan, activations=None)

    path = write(model, tmp_path / "m.onnx", x, plan=plan)

    assert [entry.name for entry in session(path).get_outputs()] == [
        entry.name for entry in session(plain).get_outputs()
    ]
    found = kernels(path)
    assert (found["QLinearConv"], found["ConvTranspose"], found["Conv"]) == (2, 1, 0)
    for got, expected in zip(run(path, x), model(x), strict=True):
        assert error(got, expected) < 0.03


class Bounded(nn.Module):
    def __init__(self, low, high):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 4, 3)
        self.low, self.high = low, high

    def forward(self, x):
        return self.second(torch.clamp(self.first(x), self.low, self.high))


@pytest.mark.parametrize(("low", "high", "clips"), [(0.0, 6.0, 0), (0.0, 0.5, 0), (-0.5, 0.5, 1), (0.25, 1.0, 1)])
def test_bounds_from_zero_upwards_need_no_kernel_and_others_cost_no_integer_kernel(tmp_path, low, high, clips):
    torch.manual_seed(0)
    model, x = Bounded(low, high), torch.randn(4, 3, 8, 8)

    path = write(model, tmp_path / "m.onnx", x)

    found = kernels(path)
    assert (found["QLinearConv"], found["Clip"]) == (2, clips)
    assert error(run(path, x)[0], model(x)) < 0.03


@pytest.mark.parametrize("network", ["cnn", "encoder"])
def test_the_batch_stays_dynamic(tmp_path, network):
    build, tensors = NETWORKS[network]
    model = build().eval()
    shape = tensors[0].shape[1:]
    path = write(model, tmp_path / "m.onnx", torch.randn(16, *shape))

    assert session(path).get_inputs()[0].shape == ["batch", *shape]
    for batch in (1, 5):
        x = torch.randn(batch, *shape).clamp(-2, 2)
        assert error(run(path, x)[0], model(x)) < 0.06


def test_the_same_model_and_inputs_give_the_same_bytes(tmp_path):
    model, x = Residual(), torch.randn(4, 3, 16, 16)
    plan = quantize(model, widths=(2, 4, 8))

    first, second = (write(model, tmp_path / name, x, plan=plan).read_bytes() for name in ("a.onnx", "b.onnx"))

    assert first == second


def test_names_of_the_graph_stay_and_new_ones_come_from_them(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)), torch.randn(2, 2, 5, 5)
    plan = quantize(model, widths=(4,))
    before, after = (
        onnx.load(write(model, tmp_path / "m.onnx", x, plan=plan, activations=kind)).graph for kind in (None, "int8")
    )

    old = {output for node in before.node for output in node.output}
    new = {output for node in after.node for output in node.output}
    assert {"0.weight", "2.weight", "output"} <= old & new
    assert {entry.name for entry in before.initializer if ".int4" in entry.name} - {"0.weight.int4.scale"} - {
        "2.weight.int4.scale"
    } == {"0.weight.int4", "2.weight.int4"}
    assert {"0.weight.int4", "0.weight.scale", "0.bias.int32"} <= {entry.name for entry in after.initializer}
    activations = {name for name in new if name.endswith((".quantized", ".dequantized"))}
    assert {name.rpartition(".")[0] for name in activations} <= old | {"input"}
    assert all(node.name == node.output[0] for node in after.node if node.output[0] in activations)


def test_the_file_is_hardly_larger_than_with_float_activations(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 128, 3))
    x = torch.randn(1, 3, 9, 9)
    plan = quantize(model, widths=(2, 3, 4, 6, 8))

    sizes = [
        write(model, tmp_path / "m.onnx", x, plan=plan, activations=kind).stat().st_size for kind in (None, "int8")
    ]

    assert sizes[1] <= 1.02 * sizes[0]


def test_a_constant_input_is_quantized_exactly(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[0].bias.fill_(-1)  # so that nothing passes the rectifier: its range is empty
        model[0].weight.abs_().neg_()

    path = write(model, tmp_path / "m.onnx", torch.ones(2, 2, 5, 5), widths=(8,))

    got = run(path, torch.ones(2, 2, 5, 5))[0]
    expected = model[2].bias.detach().numpy().reshape(1, 4, 1, 1)
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), atol=np.ptp(expected) / 255)


def test_without_integer_weights_nothing_changes(tmp_path):
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3)
    plan = quantize(model, widths=(4,), float_layers=["0.weight"])
    proto = onnx.load(write(model, tmp_path / "m.onnx", x, plan=plan, activations=None))
    before = operators(tmp_path / "m.onnx")

    assert quantize_activations(proto, [{"input": x.numpy()}]) == []

    assert [node.op_type for node in proto.graph.node] == before


def test_inputs_that_are_not_finite_are_refused_by_name(tmp_path):
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3)
    proto = onnx.load(write(model, tmp_path / "m.onnx", x, activations=None))
    feed = {"input": np.array([[1, np.nan, 2]], np.float32)}

    with pytest.raises(ArtifactError, match="the values of 'input' are not all finite"):
        quantize_activations(proto, [feed])


def test_without_inputs_the_error_asks_for_one(tmp_path):
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3)
    proto = onnx.load(write(model, tmp_path / "m.onnx", x, activations=None))

    with pytest.raises(ValueError, match="8-bit activations need calibration inputs, got none"):
        quantize_activations(proto, [])


@pytest.mark.parametrize("width", [2, 4, 8])
def test_a_layer_that_reads_nothing_but_zeros_keeps_its_bias(tmp_path, width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
        model[2].weight.mul_(4)
        model[2].bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    plan = quantize(model, widths=(width,))

    save(model, plan, tmp_path, formats=["onnx"], examples=[Inputs((torch.randn(8, 4),))], files=INT8)

    got = onnx_session(tmp_path / "model.onnx").run(None, {"input": np.zeros((1, 4), np.float32)})[0]
    np.testing.assert_allclose(got, [[0.1, -0.2, 0.3]], atol=1e-3)


def test_a_model_without_integer_kernels_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3)).double()
    plan = quantize(model, widths=(4,))
    examples = [Inputs((torch.randn(8, 4, dtype=torch.float64),))]

    with pytest.raises(ArtifactError, match="Sequential has no layer that onnxruntime runs on integers"):
        save(model, plan, tmp_path, formats=["onnx"], examples=examples, files=INT8)
