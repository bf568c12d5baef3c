"""Which integer types a file holds, what other runtimes make of it, and what `read` tells of it."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.onnx import TOLERANCE, read_onnx, write_onnx
from lightning_xai_compress.formats.onnx_check import check_onnx
from lightning_xai_compress.formats.registry import Files, Inputs, save

from onnx_nets import NETWORKS, fused_weights, quantize, storage
from traced_nets import cnn


@pytest.mark.parametrize(
    ("allowed", "stored"),
    [((2, 4, 8), {2: 2, 3: 4, 4: 4, 6: 8}), ((4, 8), {2: 4, 3: 4, 4: 4, 6: 8}), ((2, 8), {2: 2, 3: 8, 4: 8, 6: 8})],
)
def test_widths_travel_in_the_narrowest_type_that_is_allowed(tmp_path, allowed, stored):
    for width, type_width in stored.items():
        model = nn.Sequential(nn.Linear(7, 5))
        plan = quantize(model, widths=(width,))
        files = Files(onnx_bits=allowed)
        save(model, plan, tmp_path, formats=["onnx"], examples=[Inputs((torch.randn(2, 7),))], files=files)

        assert storage(tmp_path / "model.onnx") == {"0.weight": {type_width: 5}}


def test_a_width_that_no_allowed_type_holds_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(7, 5))
    plan = quantize(model, widths=(6,))

    with pytest.raises(ArtifactError, match=r"a weight has 6 bits, but onnx_bits=\(2, 4\) allows at most 4: allow 8"):
        write_onnx(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 7),))], Files(onnx_bits=(2, 4)))


@pytest.mark.parametrize("bits", [(), (3, 8), (8, 4), (4, 4), 4])
def test_other_integer_types_are_refused(bits):
    with pytest.raises(ValueError, match=r"onnx_bits must be some of \(2, 4, 8\), ascending"):
        Files(onnx_bits=bits)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"activations": "int4"}, "activations must be None or 'int8', got 'int4'"),
        ({"ranges": "max"}, "ranges must be 'minmax', 'percentile' or 'mse', got 'max'"),
        ({"float16": 1}, "float16 must be True or False, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(setting, match):
    with pytest.raises(ValueError, match=match):
        Files(**setting)


def test_openvino_reads_a_file_of_4_and_8_bits_and_refuses_2(tmp_path):
    openvino = pytest.importorskip("openvino")
    model = cnn().eval()
    plan = quantize(model, widths=(2, 3, 4, 8))
    x = torch.randn(3, 3, 8, 8)
    for name, allowed in (("all", (2, 4, 8)), ("wide", (4, 8))):
        write_onnx(model, plan, tmp_path / f"{name}.onnx", [Inputs((x,))], Files(onnx_bits=allowed))
    core = openvino.Core()

    compiled = core.compile_model(core.read_model(tmp_path / "wide.onnx"), "CPU")
    got = next(iter(compiled([x.numpy()]).values()))

    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.02 * np.abs(expected).max())
    with pytest.raises(Exception, match=r"(?i)type|unsupported|convert"):
        core.compile_model(core.read_model(tmp_path / "all.onnx"), "CPU")


@pytest.mark.parametrize("network", NETWORKS)
def test_reading_a_file_gives_weights_widths_and_bytes(tmp_path, network):
    build, tensors = NETWORKS[network]
    model = build()
    plan = quantize(model, widths=(2, 4, 8))
    path = tmp_path / "m.onnx"
    write_onnx(model, plan, path, [Inputs(tensors)])

    contents = {entry.name: entry for entry in read_onnx(path).tensors}

    fused = fused_weights(model)
    for name, bits in plan.allocation.bits.items():
        values = contents[name].values.numpy()
        if name in fused:
            np.testing.assert_allclose(values, fused[name], rtol=2e-6)
        else:
            np.testing.assert_array_equal(values, model.get_parameter(name).detach().numpy())
        widths, counts = np.unique(bits.numpy(), return_counts=True)
        assert contents[name].bits == dict(zip(widths.tolist(), counts.tolist(), strict=True))
    held = sum(len(entry.raw_data) for entry in onnx.load(path).graph.initializer)
    assert sum(entry.bytes for entry in contents.values()) == held


def test_provenance_is_kept(tmp_path):
    model = nn.Sequential(nn.Linear(7, 5))
    plan = quantize(model, widths=(4,))
    plan = type(plan)(plan.mask, plan.allocation, plan.scales, provenance={"criterion": "lrp"})
    write_onnx(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 7),))])

    assert read_onnx(tmp_path / "m.onnx").provenance == {"criterion": "lrp"}


def test_a_damaged_file_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(7, 5))
    write_onnx(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 7),))])
    whole = (tmp_path / "m.onnx").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\x00" * 64, b"no model"):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(ArtifactError, match="is damaged or no ONNX file"):
            read_onnx(tmp_path / "m.onnx")


def test_a_file_of_another_model_is_told_apart(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5))
    example = [Inputs((torch.randn(2, 7),))]
    write_onnx(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", example)
    other = nn.Sequential(nn.Linear(7, 5))

    assert check_onnx(tmp_path / "m.onnx", model, example) < TOLERANCE
    with pytest.raises(ArtifactError, match="output: the ONNX file differs from the model by"):
        check_onnx(tmp_path / "m.onnx", other, example)
