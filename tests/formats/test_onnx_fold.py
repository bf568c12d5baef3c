"""BatchNorm is folded into scales and biases, without rounding a code anew."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lightning_xai_compress.formats.codes import integer_codes
from lightning_xai_compress.formats.onnx import onnx_session
from lightning_xai_compress.formats.registry import Inputs

from onnx_nets import decode, export, fused_weights, operators, quantize, storage, stored_codes
from traced_nets import cnn


def trained_norms(model):
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-1, 1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2, generator=generator)
                nn.init.uniform_(module.bias, -1, 1, generator=generator)
    return model.eval()


def check(model, x, path, *, norms_left=0):
    """Export, and compare outputs with the model and weights with torch's own fusion."""
    plan = quantize(model, widths=(2, 4, 8))
    difference = export(model, plan, path, [Inputs((x,))])
    assert difference < 1e-5
    assert operators(path).count("BatchNormalization") == norms_left
    return plan


def test_a_norm_after_a_convolution_is_gone_and_codes_stay(tmp_path):
    model = trained_norms(cnn())
    plan = check(model, torch.randn(3, 3, 8, 8), tmp_path / "m.onnx")

    decoded, fused = decode(tmp_path / "m.onnx"), fused_weights(model)
    assert set(fused) == {"0.weight", "3.weight"}
    for name, weight in fused.items():
        np.testing.assert_allclose(decoded[name], weight, rtol=2e-6)
        codes = integer_codes(name, model.get_parameter(name), plan.scales[name], plan.allocation[name])
        np.testing.assert_array_equal(stored_codes(tmp_path / "m.onnx", name), codes.numpy())


def test_negative_and_zero_gammas_are_folded(tmp_path):
    model = trained_norms(nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-1.5, 0.0, 1.0, -0.1, 2.0, 0.0]))

    check(model, torch.randn(2, 2, 5, 5), tmp_path / "m.onnx")

    scales = [entry for entry in onnx.load(tmp_path / "m.onnx").graph.initializer if entry.name.endswith(".scale")]
    values = np.concatenate([onnx.numpy_helper.to_array(entry) for entry in scales])
    assert (values < 0).sum() == 2
    assert (values == 0).sum() == 2


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)), (4, 5)),
        (nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), (2, 3, 9)),
        (nn.Sequential(nn.Conv3d(2, 6, 2, bias=False), nn.BatchNorm3d(6, affine=False)), (2, 2, 4, 4, 4)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, eps=0.1)), (2, 4, 5, 5)),
    ],
    ids=["linear", "conv1d", "conv3d without gamma", "grouped, large eps"],
)
def test_other_layers_are_folded(tmp_path, model, shape):
    torch.manual_seed(0)
    check(trained_norms(model), torch.randn(shape), tmp_path / "m.onnx")


class Mean(nn.Module):
    def __init__(self, dims, keepdim):
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x):
        return x.mean(self.dims, keepdim=self.keepdim)


class TwiceUsed(nn.Module):
    """One convolution before two norms; a second one whose output is also read by a sum."""

    def __init__(self):
        super().__init__()
        self.shared, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.branch, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.two(self.shared(self.one(self.shared(x)).relu()))
        z = self.branch(y)
        return self.norm(z) + z


def test_what_others_read_too_is_not_folded(tmp_path):
    model = trained_norms(TwiceUsed())
    plan = check(model, torch.randn(2, 3, 4, 4), tmp_path / "m.onnx", norms_left=3)

    for name, weight in decode(tmp_path / "m.onnx").items():
        if name in plan.scales:
            np.testing.assert_array_equal(weight, model.get_parameter(name).detach().numpy())


def test_a_norm_before_a_layer_stays(tmp_path):
    model = trained_norms(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)))

    check(model, torch.randn(2, 3, 5, 5), tmp_path / "m.onnx", norms_left=1)


def test_the_bias_keeps_its_name_and_one_is_made_where_there_was_none(tmp_path):
    model = trained_norms(cnn())
    check(model, torch.randn(3, 3, 8, 8), tmp_path / "m.onnx")

    names = {entry.name for entry in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert {"0.bias", "3.bias"} <= names  # the first convolution has none of its own
    assert not {name for name in names if name.startswith(("1.", "4."))}  # the norms
    assert storage(tmp_path / "m.onnx").keys() == {"0.weight", "3.weight", "6.weight", "9.weight"}
    assert onnx_session(tmp_path / "m.onnx").get_inputs()[0].name == "input"


@pytest.mark.parametrize(
    ("pool", "shape", "operator"),
    [
        (nn.AdaptiveAvgPool2d(1), (2, 3, 6, 5), "GlobalAveragePool"),
        (nn.AdaptiveAvgPool1d(1), (2, 3, 6), "GlobalAveragePool"),
        (nn.AdaptiveAvgPool3d(1), (2, 3, 4, 4, 4), "GlobalAveragePool"),
        (Mean((2, 3), keepdim=True), (2, 3, 6, 5), "GlobalAveragePool"),
        (Mean((1, 3), keepdim=True), (2, 3, 6, 5), "ReduceMean"),  # over channels
        (Mean((3,), keepdim=True), (2, 3, 6, 5), "ReduceMean"),
        (Mean((2, 3), keepdim=False), (2, 3, 6, 5), "ReduceMean"),
    ],
    ids=str,
)
def test_means_over_all_positions_are_pooling(tmp_path, pool, shape, operator):
    torch.manual_seed(0)
    convolution = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](3, 4, 1)
    model = nn.Sequential(convolution, pool).eval()

    check(model, torch.randn(shape), tmp_path / "m.onnx")

    found = {"ReduceMean", "GlobalAveragePool"} & set(operators(tmp_path / "m.onnx"))
    assert found == {operator}
    x = torch.randn(5, *shape[1:])
    got = onnx_session(tmp_path / "m.onnx").run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(got, model(x).detach().numpy(), atol=1e-6)
