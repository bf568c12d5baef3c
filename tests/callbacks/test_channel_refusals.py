"""What channel pruning refuses, and which channels stay."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xai_compress import (
    ArtifactError,
    Channels,
    CompressionError,
    Quantization,
    XAICompression,
    load_compressed,
)

from toy import TiedNet, ToyNet, compression, fit
from wide import WideNet, logits, structured

pytest.importorskip("torch_pruning")


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

    run = structured(tmp_path, channels={"macs": 0.85, "protect": ["first"]})

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
