"""Whole channels that go in a fit: masked while it lasts, gone in every file."""

import copy
import json

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from lightning_xai_compress import (
    ArtifactError,
    ChannelPruning,
    Channels,
    CompressedExport,
    CompressionError,
    Files,
    Quantization,
    XAICompression,
    load_compressed,
)
from lightning_xai_compress.structure import macs_of

from budgets import Stop
from toy import Corners, TiedNet, ToyNet, compression, fit

pytest.importorskip("torch_pruning")


class WideNet(ToyNet):
    """With enough channels to lose some: a residual block between two convolutions."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.first, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.second, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(64, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = x + self.outer(F.relu(self.inner(x)))
        x = F.avg_pool2d(F.relu(self.second(x)), 3)
        return self.head(x.flatten(1))


def structured(folder, **settings):
    channels = Channels(**{"macs": 0.5, "steps": 3, "multiple": 4} | settings.pop("channels", {}))
    return compression(folder, **{"structure": "channel", "channels": channels, "sparsity": 0.2} | settings)


def macs(model):
    model = model.eval()
    counted, rest = macs_of(model, lambda: model(torch.randn(2, 1, 6, 6)))
    return sum(counted.values()) + rest


def logits(model):
    with torch.no_grad():
        return model.eval()(Corners().data.tensors[0])


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
    run = structured(tmp_path, sparsity=0.8)  # the weights of channels that are gone among them

    fit(tmp_path, [run], WideNet)

    small = load_compressed(tmp_path / "model.safetensors", WideNet())
    weights = {name: each for name, each in small.named_parameters() if each.dim() > 1}
    zeros = sum(int((each == 0).sum()) for each in weights.values())
    total = sum(each.numel() for each in weights.values())
    gone = 1 - total / sum(each.numel() for each in WideNet().parameters() if each.dim() > 1)
    assert gone + (1 - gone) * run.report.sparsity == pytest.approx(0.8, abs=0.001)
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


def test_a_file_without_channels_refuses_a_smaller_model_still(tmp_path):
    plain = compression(tmp_path / "plain")
    fit(tmp_path, [plain], WideNet)

    with pytest.raises(ArtifactError, match="is of another model than this ToyNet"):
        load_compressed(tmp_path / "plain" / "model.safetensors", ToyNet())


def test_a_file_with_fewer_channels_refuses_another_model_and_leaves_it_as_it_was(tmp_path):
    run = structured(tmp_path)
    fit(tmp_path, [run], WideNet)
    other = ToyNet()
    before = copy.deepcopy(other)

    with pytest.raises(ArtifactError, match="is of another model than this ToyNet"):
        load_compressed(tmp_path / "model.safetensors", other)

    assert repr(other) == repr(before)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"first": nn.Conv2d(1, 16, 5, padding=2, bias=False)},
        {"head": nn.Linear(64, 10)},
        {"inner": nn.Conv2d(16, 32, 3, padding=1), "outer": nn.Conv2d(32, 16, 3, padding=1)},
    ],
    ids=["larger kernels", "more classes", "wider"],
)
def test_a_file_with_fewer_channels_refuses_a_model_of_other_sizes(tmp_path, change):
    fit(tmp_path, [structured(tmp_path)], WideNet)
    other = WideNet()
    for name, layer in change.items():
        setattr(other, name, layer)

    with pytest.raises(ArtifactError, match="of a model of other sizes than this WideNet"):
        load_compressed(tmp_path / "model.safetensors", other)


@pytest.mark.parametrize("zero", ["head", "outer"])
def test_a_model_that_begins_with_zeros_shows_its_mistakes_in_the_trial(tmp_path, zero):
    class Mixed(WideNet):
        """A softmax over the channels, which is another one without some of them."""

        def __init__(self):
            super().__init__()
            nn.init.zeros_(getattr(self, zero).weight)

        def forward(self, x):
            x = F.relu(self.norm(self.first(x)))
            x = x + self.outer(F.softmax(self.inner(x), 1))
            return self.head(F.avg_pool2d(F.relu(self.second(x)), 3).permute(0, 2, 1, 3).flatten(1))

    run = structured(tmp_path, channels={"macs": 0.8})

    model, _ = fit(tmp_path, [run], Mixed)

    assert any(entry.name == "inner.weight" and "differs" in entry.reason for entry in run.report.skipped)
    small = load_compressed(tmp_path / "model.safetensors", Mixed())
    assert small.head.in_features < 64
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-5)


def test_what_stays_for_its_unknown_relevance_counts_before_training(tmp_path):
    class Gated(WideNet):
        def forward(self, x):
            x = F.relu(self.norm(self.first(x)))
            x = self.second(x * torch.sigmoid(self.outer(F.relu(self.inner(x)))))
            return self.head(F.avg_pool2d(F.relu(x), 3).flatten(1))

    model = Gated()

    with pytest.raises(ValueError, match=r"at least 0\.\d+ is left.*inner\.weight.*relevance is unknown"):
        fit(tmp_path, [structured(tmp_path, channels={"macs": 0.2}, average_bits=8.0)], model)
    assert model.losses == []


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


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"structure": "filter"}, "structure must be None or 'channel', got 'filter'"),
        ({"channels": Channels()}, "channels=... says which channels go: add structure='channel'"),
        ({"structure": "channel", "channels": 0.5}, r"channels must be Channels\(...\), got 0.5"),
    ],
)
def test_settings_are_refused_when_they_are_made(settings, text):
    with pytest.raises(ValueError, match=text):
        XAICompression(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"macs": 0.5, "channels": 0.5}, "Channels takes one target, got macs and channels"),
        ({"macs": 1.0}, r"macs, the share that is left, must lie in \(0, 1\), got 1.0"),
        ({"score": "max"}, "a channel's score must be one of sum, mean, rms, output, got 'max'"),
        ({"multiple": 0}, "multiple must be >= 1, got 0"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"floor": 1.0}, r"floor, a share of each group's channels, must lie in \[0, 1\), got 1.0"),
        ({"protect": "head"}, "protect must be a list of strings"),
    ],
)
def test_channels_are_refused_when_they_are_made(settings, text):
    with pytest.raises(ValueError, match=text):
        Channels(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"channels": {"macs": 0.01}}, ValueError, r"macs=0.01 cannot be met: .* at least 0\.\d+ is left"),
        ({"channels": {"protect": ["nothing*"]}}, ValueError, "nothing.* matches no layer"),
        ({"exclude": ["inner", "outer", "second"]}, CompressionError, "has no channels that can go"),
        (
            {"quantization": Quantization(bits_per="group", group_size=4)},
            ValueError,
            "bits_per='group' cuts input channels into groups of one size",
        ),
        ({"criterion": "magnitude", "channels": {"score": "output"}}, ValueError, "'output' is of signed relevance"),
    ],
)
def test_what_cannot_be_met_is_refused_before_training(tmp_path, settings, error, text):
    model = WideNet()

    with pytest.raises(error, match=text):
        fit(tmp_path, [structured(tmp_path, **settings)], model)
    assert model.losses == []


def test_a_model_that_cannot_be_shrunk_is_refused_by_name_before_training(tmp_path):
    class Shuffled(WideNet):
        def forward(self, x):
            x = F.relu(self.norm(self.first(x)))
            x = x.view(len(x), 2, 8, 6, 6).transpose(1, 2).flatten(1, 2)
            return self.head(F.avg_pool2d(F.relu(self.second(x)), 3).view(len(x), 2, 8, 4).transpose(1, 2).flatten(1))

    model = Shuffled()

    with pytest.raises(CompressionError, match=r"(channels that can go.*first\.weight|cannot be traced)"):
        fit(tmp_path, [structured(tmp_path, exclude=["inner", "outer"])], model)
    assert model.losses == []


def test_channels_go_before_a_flatten_of_permuted_ones(tmp_path):
    class Permuted(WideNet):
        def forward(self, x):
            x = F.relu(self.norm(self.first(x)))
            return self.head(F.avg_pool2d(F.relu(self.second(x)), 3).permute(0, 2, 1, 3).flatten(1))

    run = structured(tmp_path, exclude=["inner", "outer"])

    model, _ = fit(tmp_path, [run], Permuted)

    small = load_compressed(tmp_path / "model.safetensors", Permuted())
    assert small.head.in_features < 64
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-5)


def test_protected_layers_keep_their_channels_and_are_named(tmp_path):
    run = structured(tmp_path, channels={"protect": ["inner"], "macs": 0.7})

    fit(tmp_path, [run], WideNet)

    assert load_compressed(tmp_path / "model.safetensors", WideNet()).inner.out_channels == 24
    assert ("inner.weight", "its channels are protected") in [(each.name, each.reason) for each in run.report.skipped]


def test_tied_weights_keep_their_channels(tmp_path):
    class Tied(TiedNet):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(32, 16)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            x = F.relu(self.norm(self.first(x)))
            x = F.avg_pool2d(F.relu(self.third(F.relu(self.second(x)))), 3)
            return self.head(F.relu(self.last(x.flatten(1))))

    run = structured(tmp_path, channels={"channels": 0.5, "macs": None})

    model, _ = fit(tmp_path, [run], Tied)

    small = load_compressed(tmp_path / "model.safetensors", Tied())
    assert small.last.out_features == 8
    assert small.second.weight is small.third.weight
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-5, atol=1e-5)


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_xai_compress.structure.dependencies.find_spec", lambda name: None)

    with pytest.raises(ImportError, match=r"pip install lightning-xai-compress\[structured\]"):
        fit(tmp_path, [structured(tmp_path)], WideNet)


def test_a_config_can_ask_for_it():
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(XAICompression, "compression")

    found = parser.parse_args(
        ["--compression.structure=channel", "--compression.channels.macs=0.4", "--compression.channels.score=rms"]
    )

    assert found.compression.channels.macs == 0.4
    assert found.compression.channels.score == "rms"
