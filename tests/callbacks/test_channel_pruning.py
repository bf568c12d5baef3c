"""Whole channels that go in a fit: masked while it lasts, gone in every file."""

import json

import onnxruntime
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser

from lightning_xai_compress import (
    ChannelPruning,
    Channels,
    CompressedExport,
    Files,
    Quantization,
    XAICompression,
    load_compressed,
)

from budgets import Stop
from toy import Corners, fit
from wide import WideNet, logits, macs, structured

pytest.importorskip("torch_pruning")


def test_files_hold_a_smaller_model_that_computes_the_same(tmp_path):
    run = structured(tmp_path, formats=["safetensors", "onnx", "pt2"])

    model, _ = fit(tmp_path, [run], WideNet)

    assert all(model.state_dict()[name].shape == each.shape for name, each in WideNet().state_dict().items())
    small = load_compressed(tmp_path / "model.safetensors", WideNet())
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-5, atol=1e-5)
    assert 0.35 < macs(small) / macs(WideNet()) <= 0.5
    channels = [small.first.out_channels, small.inner.out_channels, small.second.out_channels]
    assert [each % 4 for each in channels] == [0, 0, 0]
    assert sum(channels) < 16 + 24 + 16
    assert (small.first.weight.shape[0], small.norm.num_features) == (small.outer.out_channels,) * 2
    assert small.head.in_features == 4 * small.second.out_channels
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = Corners().data.tensors[0]
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits(model), rtol=1e-4, atol=1e-4)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(x), logits(model), rtol=1e-4, atol=1e-4)


def test_the_report_is_of_the_smaller_model_and_tells_of_every_step(tmp_path):
    run = structured(tmp_path, sparsity=0.85)  # the weights of channels that are gone among them

    fit(tmp_path, [run], WideNet)

    small = load_compressed(tmp_path / "model.safetensors", WideNet())
    weights = {name: each for name, each in small.named_parameters() if each.dim() > 1}
    zeros = sum(int((each == 0).sum()) for each in weights.values())
    total = sum(each.numel() for each in weights.values())
    gone = 1 - total / sum(each.numel() for each in WideNet().parameters() if each.dim() > 1)
    assert gone + (1 - gone) * run.report.sparsity == pytest.approx(0.85, abs=0.001)
    assert 0.3 < run.report.sparsity <= zeros / total  # some weights are quantized to zero
    assert run.report.average_bits == pytest.approx(3.0, abs=0.02)  # over what is left
    steps = [event for event in run.report.history if event["event"] == "channels removed"]
    assert [event["left"] for event in steps] == sorted((event["left"] for event in steps), reverse=True)
    assert len(steps) == 3
    assert steps[-1]["left"] == pytest.approx(macs(small) / macs(WideNet()))
    assert steps[-1]["left"] <= 0.5 < steps[0]["left"]
    removed = sum(int(each.sum()) for each in run.stages()[-1].removed.values())
    assert steps[-1]["channels"] == removed > 0
    assert "head.weight: its channels stay: nothing in the model uses them but its output" in [
        f"{entry.name}: {entry.reason}" for entry in run.report.skipped
    ]


def test_without_unstructured_pruning_only_channels_go(tmp_path):
    run = structured(tmp_path, sparsity=0.0)

    fit(tmp_path, [run], WideNet)

    small = load_compressed(tmp_path / "model.safetensors", WideNet())
    whole = dict(WideNet().named_parameters())
    assert small.first.weight.numel() < whole["first.weight"].numel()
    assert not any(event["event"] == "pruned" for event in run.report.history)


@pytest.mark.parametrize(
    ("target", "measured"),
    [
        ({"macs": None, "parameters": 0.4}, lambda net: sum(p.numel() for p in net.parameters() if p.dim() > 1)),
        (
            {"macs": None, "channels": 0.6},
            lambda net: net.first.out_channels + net.inner.out_channels + net.second.out_channels,
        ),
        ({"macs": 0.3}, macs),
    ],
)
def test_every_target_is_met_from_below(tmp_path, target, measured):
    run = structured(tmp_path, channels={"multiple": 1, **target})

    fit(tmp_path, [run], WideNet)

    small = load_compressed(tmp_path / "model.safetensors", WideNet())
    share = next(value for value in target.values() if value)
    assert 0.9 * share < measured(small) / measured(WideNet()) <= share


@pytest.mark.parametrize("criterion", ["lrp", "deeplift", "taylor", "magnitude", "random"])
def test_any_criterion_scores_channels(tmp_path, criterion):
    run = structured(tmp_path, criterion=criterion, channels={"score": "rms"}, selection="least")

    fit(tmp_path, [run], WideNet)

    assert run.report.history[-1]["event"] == "quantized"
    assert sum(int(each.sum()) for each in run.stages()[-1].removed.values()) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"target_size": 0.05, "average_bits": None, "sparsity": None},
        {"files": Files(float16=True, merge_batchnorm=True)},
        {"quantization": Quantization(bits_per="layer")},
        {"quantization": Quantization(strategy="ranked")},
        {"formats": ["onnx"], "files": Files(activations="int8"), "quantization": Quantization(activations="int8")},
        {"metric": "val_acc", "mode": "max", "export": "best"},
    ],
    ids=["budget", "merged", "layer", "ranked", "int8", "best"],
)
def test_it_goes_together_with_everything_else(tmp_path, settings):
    run = structured(tmp_path, **settings)

    model, _ = fit(tmp_path, [run], WideNet)

    assert run.report.halted == ""
    if "formats" in settings:
        x = Corners().data.tensors[0]
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert (torch.from_numpy(found).argmax(1) == logits(model).argmax(1)).float().mean() > 0.9
        return
    small = load_compressed(tmp_path / "model.safetensors", WideNet())
    assert macs(small) <= 0.5 * macs(WideNet())
    if "target_size" in settings:
        size = (tmp_path / "model.safetensors").stat().st_size
        target = int(0.05 * run.report.dense.bytes)
        assert 0.98 * target <= size <= target
    if settings.get("export") != "best":
        torch.testing.assert_close(logits(small), logits(model), rtol=1e-3, atol=1e-3)


def test_what_is_gone_stays_gone_and_costs_no_gradient(tmp_path):
    class Watch(CompressedExport):
        seen = ()

        def after_batch(self, session):
            stage = session.stage(ChannelPruning)
            self.seen = (*self.seen, {name: each.clone() for name, each in stage.removed.items()})

    stages = [
        ChannelPruning(Channels(macs=0.5, steps=4, multiple=2), start=0.2, end=0.6),
        watch := Watch(export_dir=str(tmp_path)),
    ]

    model, _ = fit(tmp_path, stages, WideNet)

    for earlier, later in zip(watch.seen, watch.seen[1:], strict=False):
        assert all(bool((later[name] | ~gone).all()) for name, gone in earlier.items())
    gone = watch.seen[-1]["first.weight"]
    assert not model.first.weight[gone].any()
    assert not model.outer.weight[gone].any()
    assert not model.inner.weight[:, gone].any()
    small = load_compressed(tmp_path / "model.safetensors", WideNet())
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("epochs", [3, 6])
def test_a_resumed_fit_ends_with_the_same_channels(tmp_path, epochs):
    whole, _ = fit(tmp_path / "whole", [structured(tmp_path / "whole")], WideNet)
    checkpoint = tmp_path / "part.ckpt"
    fit(tmp_path / "part", [structured(tmp_path / "part"), Stop(epochs, checkpoint)], WideNet)

    resumed, _ = fit(tmp_path / "again", [structured(tmp_path / "again")], WideNet, ckpt_path=checkpoint)

    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    files = [load_compressed(tmp_path / folder / "model.safetensors") for folder in ("whole", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_the_history_counts_the_bits_of_what_is_left(tmp_path):
    run = structured(tmp_path, average_bits=4.0)

    fit(tmp_path, [run], WideNet)

    told = next(event["average_bits"] for event in run.report.history if event["event"] == "quantized")
    assert told == pytest.approx(run.report.average_bits)


def test_the_report_says_what_was_asked_for(tmp_path):
    run = structured(tmp_path)
    fit(tmp_path, [run], WideNet)

    written = json.loads((tmp_path / "report.json").read_text())

    assert [event["channels"] for event in written["history"] if event["event"] == "channels removed"][-1] > 0


def test_a_config_can_ask_for_it():
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(XAICompression, "compression")

    found = parser.parse_args(
        ["--compression.structure=channel", "--compression.channels.macs=0.4", "--compression.channels.score=rms"]
    )

    assert found.compression.channels.macs == 0.4
    assert found.compression.channels.score == "rms"
