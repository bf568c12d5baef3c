"""What cannot become an ONNX file is refused by name."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import onnx as onnx_format
from lightning_xai_compress.formats.registry import Inputs

from onnx_nets import export, quantize, storage
from traced_nets import FixedBatch, OnData, SecondReference, cnn

onnx = pytest.importorskip("onnx")


def test_without_examples_the_error_asks_for_one(tmp_path):
    model = cnn()

    with pytest.raises(ArtifactError, match=r"traces the model with an example.*pass examples=\[Inputs\(\(x,\)\)\]"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [])


def test_a_model_that_branches_on_data_is_refused_with_the_reason(tmp_path, capfd):
    model = OnData().train()
    plan = quantize(model, widths=(4,))

    with pytest.raises(ArtifactError) as caught:
        export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])

    assert str(caught.value).startswith("OnData could not be traced: GuardOnDataDependentSymNode: Could not guard")
    assert "Leave formats that trace (onnx, pt2) out, or define a forward that torch.export can trace" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert model.training
    assert capfd.readouterr() == ("", "")


def test_a_fixed_batch_is_refused_by_the_name_of_the_input(tmp_path):
    model = FixedBatch()

    with pytest.raises(ArtifactError, match=r"Constraints violated \(x\.size\(\)\[0\]\).*no fixed batch size"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(3, 4),))])


def test_an_example_that_the_model_does_not_take_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))

    with pytest.raises(
        ArtifactError, match="Sequential cannot be called with the example: RuntimeError: mat1 and mat2"
    ):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 5),))])


def test_a_weight_off_its_grid_is_refused_by_name(tmp_path):
    model = cnn()
    plan = quantize(model, widths=(4,))
    with torch.no_grad():
        model[6].weight[3, 2] += 0.3 * plan.scales["6.weight"][3]

    with pytest.raises(
        ArtifactError, match=r"6\.weight does not lie on its grid: 1 of 96 .* channel 3 \(scale .*4 bits"
    ):
        export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 3, 8, 8),))])
    assert not (tmp_path / "m.onnx").exists()


def test_a_code_beyond_its_width_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    plan = quantize(model, widths=(4,))
    plan.allocation.bits["0.weight"].fill_(3)

    with pytest.raises(ArtifactError, match=r"0\.weight does not lie on its grid"):
        export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


def test_scales_of_another_shape_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    plan = quantize(nn.Sequential(nn.Linear(4, 3)), widths=(4,))

    with pytest.raises(ArtifactError, match=r"0\.weight has 2 output channels, but \(3,\) scales"):
        export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


def test_a_plan_of_another_model_is_refused(tmp_path):
    plan = quantize(nn.Sequential(nn.Linear(4, 3)), widths=(4,))

    with pytest.raises(ArtifactError, match=r"the plan names what Linear lacks: 0\.weight"):
        export(nn.Linear(4, 3), plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


def test_a_weight_that_stays_float_in_the_graph_is_refused_by_name(tmp_path):
    model = SecondReference()

    with pytest.raises(ArtifactError, match=r"fc\.weight is in the graph, but not as the parameter of its layer"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


class Auxiliary(OnData):
    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) + self.aux(x) if self.training else self.fc(x)


def test_a_layer_that_only_training_uses_is_left_out_with_a_warning(tmp_path):
    model = Auxiliary()

    with pytest.warns(UserWarning, match=r"not in the ONNX file, since Auxiliary does not use .*: aux\.weight"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])

    assert storage(tmp_path / "m.onnx") == {"fc.weight": {4: 2}}


def test_a_difference_beyond_the_tolerance_is_refused_with_the_numbers(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 2))
    plan = quantize(model, widths=(4,))
    written = onnx_format._write

    def damage(proto, path):
        bias = next(entry for entry in proto.graph.initializer if entry.name == "0.bias")
        bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) + np.float32(0.5)).tobytes()
        written(proto, path)

    monkeypatch.setattr(onnx_format, "_write", damage)
    with pytest.raises(
        ArtifactError, match=r"output: the ONNX file differs from the model by 0\.5, which is .*0\.0001"
    ):
        export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


def test_a_file_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 2))
    monkeypatch.setattr(onnx_format, "_LARGEST_FILE", 100)

    with pytest.raises(ArtifactError, match="a single file holds 2: leave 'onnx' out of formats"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_examples_without_a_finite_output_prove_nothing(tmp_path, value):
    model = nn.Sequential(nn.Linear(4, 2))

    with pytest.raises(ArtifactError, match="output: the model gives no finite number on the examples"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.full((2, 4), value),))])


def test_more_inputs_than_forward_takes_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))

    with pytest.raises(ArtifactError, match=r"Sequential\.forward takes 1 positional arguments, got more"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),) * 2)])


def test_half_precision_is_compared_by_its_own_rounding(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).half()

    difference = export(
        model, quantize(model, widths=(8,)), tmp_path / "m.onnx", [Inputs((torch.randn(4, 64).half(),))]
    )

    assert difference < 4 * torch.finfo(torch.float16).eps


class NamedAsItsWeight(OnData):
    def forward(self, x):
        return {"fc.weight": self.fc(x)}


def test_an_output_may_have_the_name_of_a_weight(tmp_path):
    model = NamedAsItsWeight()

    assert export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))]) < 1e-6
