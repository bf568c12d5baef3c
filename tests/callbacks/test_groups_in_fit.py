"""Groups of input channels with a bit width each: through a step, a fit, a checkpoint, files and commands."""

import json
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_xai_compress import BitAllocation, Files, Mask, Quantization, load_compressed
from lightning_xai_compress.callbacks.checkpoint import plan_of
from lightning_xai_compress.callbacks.latent import LatentCopy
from lightning_xai_compress.commands import main
from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.plan import by_rows
from lightning_xai_compress.quantization import fit_scales, quantize, refit_scales

from toy import compression, fit

TESTS = Path(__file__).parent.parent
BITS = torch.tensor([2, 8, 3, 4, 6, 2, 5, 7, 3, 2, 8, 4], dtype=torch.uint8)  # 4 channels of 3 groups
GROUPS = Quantization(bits_per="group", group_size=4)  # second.weight: 2, head.weight: 8, first.weight: none


def grouped_layer(memory_format):
    layer = nn.Conv2d(6, 4, 3).to(memory_format=memory_format)
    latent = LatentCopy({"weight": layer.weight})
    keep = torch.rand(4, 6, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.4
    latent.apply_mask(Mask({"weight": keep}))
    rows = by_rows(layer.weight.detach(), 12)
    scales = torch.cat([fit_scales(rows[i : i + 1], int(width))[0] for i, width in enumerate(BITS)])
    latent.apply_bits(BitAllocation({"weight": BITS}, {"weight": 18}), {"weight": scales})
    return layer, latent, keep, scales


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_equals_the_straight_through_estimator(memory_format):
    layer, latent, keep, scales = grouped_layer(memory_format)
    first, shadow = scales.clone(), nn.Parameter(latent.state_dict()["latents"]["weight"].clone())
    ours, theirs = torch.optim.SGD([layer.weight], 0.01), torch.optim.SGD([shadow], 0.01)
    latent.attach([ours])
    try:
        for seed in range(8):
            gradient = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(seed))
            layer.weight.grad, shadow.grad = torch.empty_like(layer.weight).copy_(gradient), gradient * keep
            latent.before_step(ours)
            ours.step()
            theirs.step()
        scales = refit_scales(shadow.detach(), BITS, scales)
    finally:
        latent.detach()

    assert not torch.equal(scales, first)
    assert torch.equal(layer.weight, quantize(shadow.detach(), BITS, scales))
    plan = latent.plan()
    assert torch.equal(plan.scales["weight"], scales)
    assert plan.allocation.channel_size == {"weight": 18}
    assert latent.holds()
    values, refitted = latent.projected("weight", shadow.detach())
    assert torch.equal(refitted, refit_scales(shadow.detach(), BITS, scales))
    assert torch.equal(values, quantize(shadow.detach(), BITS, refitted))


@pytest.fixture(scope="module")
def grouped_fit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    callback = compression(folder, quantization=GROUPS, formats=["safetensors", "onnx", "pt2"])
    checkpoints = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_last=True, save_top_k=-1)
    model, _ = fit(folder, [callback, checkpoints], enable_checkpointing=True)
    return folder, callback, model


def test_a_fit_ends_in_files_that_give_the_model_back(grouped_fit):
    folder, callback, model = grouped_fit

    state = load_compressed(folder / "model.safetensors")

    assert {name: torch.equal(state[name], tensor) for name, tensor in model.state_dict().items()} == dict.fromkeys(
        state, True
    )
    assert not callback.report.failed
    assert {each.format: each.max_abs_diff < 2e-6 for each in callback.report.artifacts} == {
        "safetensors": True,
        "onnx": True,
        "pt2": True,
    }
    rows = {layer.name: sum(layer.bits.values()) for layer in callback.report.layers}
    assert rows == {"first.weight": 8, "second.weight": 16, "head.weight": 32}
    assert 2.5 < callback.report.average_bits <= 3.0


def test_groups_of_one_channel_have_widths_of_their_own(grouped_fit):
    plan = plan_of(torch.load(grouped_fit[0] / "last.ckpt", weights_only=True))

    head = plan.allocation["head.weight"].view(4, 8)
    assert any(len(set(row)) > 1 for row in head.tolist())
    assert plan.allocation.channel_size == {"first.weight": 9, "second.weight": 36, "head.weight": 4}


def test_a_resumed_fit_ends_as_the_uninterrupted_one(grouped_fit, tmp_path):
    folder, _, model = grouped_fit

    resumed, _ = fit(tmp_path, [compression(tmp_path, quantization=GROUPS)], ckpt_path=folder / "epoch=5.ckpt")

    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_rows_that_no_weight_has_are_refused_in_a_checkpoint(grouped_fit):
    checkpoint = torch.load(grouped_fit[0] / "last.ckpt", weights_only=True)
    state = next(each for each in checkpoint["callbacks"].values() if "latent" in each)["latent"]
    state["bits"]["second.weight"] = state["bits"]["second.weight"].repeat(3)

    with pytest.raises(ArtifactError, match=r"bits of second\.weight has shape \(48,\), expected one number a row of"):
        plan_of(checkpoint)
    state["scales"]["second.weight"] = state["scales"]["second.weight"][:8]
    state["bits"]["second.weight"] = state["bits"]["second.weight"][:16]
    with pytest.raises(ArtifactError, match="its bit widths and scales name different parameters, or rows"):
        plan_of(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx", "model.pt2"])
def test_commands_take_files_with_groups(grouped_fit, tmp_path, capsys, monkeypatch, name):
    folder = grouped_fit[0]
    monkeypatch.chdir(TESTS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = ["--model", "toy:ToyNet", "--input-shape", "3,1,6,6"]
    form = Path(name).suffix[1:]

    assert main(["export", str(folder / "last.ckpt"), "--format", form, "--output", str(tmp_path), *model]) == 0
    assert main(["verify", str(tmp_path / name), "--against", str(folder / "last.ckpt"), *model]) == 0
    assert capsys.readouterr().out.endswith("the same\n")
    assert main(["inspect", str(tmp_path / name), "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert {layer["name"]: sum(layer["bits"].values()) for layer in told["layers"]} == {
        "first.weight": 8,
        "second.weight": 16,
        "head.weight": 32,
    }
    average = json.loads((folder / "report.json").read_text())["average_bits"]
    assert told["totals"]["average_bits"] == pytest.approx(average, abs=1e-3) or form == "onnx"  # has fewer widths


def test_integer_kernels_that_groups_have_none_of_are_refused_or_named_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"activations='int8' trains for integer kernels.*use bits_per='channel'"):
        Quantization(activations="int8", bits_per="group", group_size=4)
    files, settings = Files(activations="int8"), {"formats": ["onnx"], "quantization": GROUPS}
    with pytest.raises(ValueError, match=r"group_size=4: .* computes with floats in head\.weight, .*which is all"):
        fit(tmp_path, [compression(tmp_path, exclude=["first"], files=files, **settings)], max_epochs=1)
    with pytest.warns(UserWarning, match="integer kernel") as caught:
        fit(tmp_path, [compression(tmp_path, files=files, **settings)], max_epochs=2)
    told = [str(each.message) for each in caught]
    assert any("computes with floats in head.weight, second.weight" in each for each in told)
    assert any("second.weight stays float in Conv, which has no integer kernel for groups" in each for each in told)
