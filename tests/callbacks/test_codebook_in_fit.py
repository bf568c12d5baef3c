"""Layers that share values: in a fit, in every file, and under a budget."""

from dataclasses import replace

import onnxruntime
import pytest
import torch

from lightning_xai_compress import (
    Channels,
    Files,
    MixedPrecision,
    Pruning,
    Quantization,
    Scoring,
    load_compressed,
)
from lightning_xai_compress.callbacks.checkpoint import plan_of

from budgets import Stop, WideNet, budgeted
from toy import Corners, ToyNet, compression, fit

CODEBOOK = Quantization(quantizer="codebook", bits_per="layer")


def shared(folder, **settings):
    return compression(folder, **{"quantization": CODEBOOK, "bits": (4,), "average_bits": 4.0} | settings)


def weights_of(model):
    return {name: each.detach() for name, each in model.named_parameters() if each.dim() > 1}


def assert_files_hold(model, folder):
    """All three formats give the model back."""
    loaded = load_compressed(folder / "model.safetensors", ToyNet())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    x = Corners().data.tensors[0]
    expected = model.eval()(x).detach()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    program = torch.export.load(folder / "model.pt2").module()
    torch.testing.assert_close(program(x).detach(), expected, rtol=1e-5, atol=1e-6)


def test_every_layer_ends_with_few_values_and_zero_among_them(tmp_path):
    model, _ = fit(tmp_path, [shared(tmp_path)])

    for weight in weights_of(model).values():
        values = weight.unique()
        assert 3 < len(values) <= 15
        assert 0.0 in values
        assert torch.equal(values.to(torch.bfloat16).float(), values)
    spacing = model.second.weight.unique().diff()
    assert spacing.max() > 1.2 * spacing.min()  # no grid


def test_files_give_the_very_values_back(tmp_path):
    run = shared(tmp_path, formats=["safetensors", "onnx", "pt2"])

    model, _ = fit(tmp_path, [run])

    assert_files_hold(model, tmp_path)
    assert run.report.average_bits == 4.0
    assert {entry.format for entry in run.report.artifacts} == {"safetensors", "onnx", "pt2"}


@pytest.mark.parametrize("bits", [(2,), (3,), (8,)])
def test_other_numbers_of_clusters(tmp_path, bits):
    run = shared(tmp_path, bits=bits, average_bits=float(bits[0]), formats=["safetensors", "onnx", "pt2"])

    model, _ = fit(tmp_path, [run])

    for weight in weights_of(model).values():
        assert len(weight.unique()) <= 2 ** bits[0] - 1
    assert len(run.report.artifacts) == 3


def test_values_move_with_their_weights_and_pruned_ones_stay_zero(tmp_path):
    seen = []

    class Watch(MixedPrecision):
        def after_batch(self, session):
            if session.latent.quantized:
                seen.append({name: each.clone() for name, each in session.latent.codebooks.items()})
                for name, keep in session.latent.keep.items():
                    assert not session.latent.parameters[name][~keep].any()

    run = shared(tmp_path)
    run._precision = Watch(average_bits=4.0, bits=(4,), start=0.6, quantization=CODEBOOK)

    model, _ = fit(tmp_path, [run], max_epochs=12)

    assert not torch.equal(seen[0]["head.weight"], seen[-1]["head.weight"])
    for name, weight in weights_of(model).items():
        assert torch.isin(weight.unique(), seen[-1][name]).all()


@pytest.mark.parametrize("sensitivity", ["relevance", "absolute", "fisher", "error"])
def test_what_k_means_is_weighted_by_changes_the_values(tmp_path, sensitivity):
    quantization = Quantization(quantizer="codebook", bits_per="layer", sensitivity=sensitivity)
    seen = []

    class Watch(MixedPrecision):
        def choose(self, session, scores, weights, average_bits):
            seen.append(scores)
            return super().choose(session, scores, weights, average_bits)

    run = shared(tmp_path, quantization=quantization, scoring=Scoring(samples=64, statistics=("rms", "absolute")))
    run._precision = Watch(average_bits=4.0, bits=(4,), start=0.6, quantization=quantization)

    model, _ = fit(tmp_path, [run])

    importance = run.session.latent._importance
    assert bool(importance) == (sensitivity != "error")
    (scores,) = seen
    for kind in ("sensitivity", "absolute") if scores is not None else ():
        same = all(torch.equal(importance[name], each) for name, each in getattr(scores, kind).items())
        assert same == (sensitivity == {"sensitivity": "relevance"}.get(kind, kind))
    assert len(model.head.weight.unique()) <= 15


@pytest.mark.slow
def test_more_relevance_gets_more_values_under_a_budget(tmp_path):
    run = budgeted(tmp_path, target_size=0.08, quantization=CODEBOOK, bits=(2, 3, 4, 6))

    model, _ = fit(tmp_path, [run], model=WideNet)

    size = (tmp_path / "model.safetensors").stat().st_size
    target = int(0.08 * run.report.dense.bytes)
    assert 0.9 * target <= size <= target  # three layers leave little choice
    loaded = load_compressed(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], each) for name, each in model.state_dict().items())


@pytest.mark.parametrize(("epochs", "channels"), [(5, None), (7, None), (7, 4)])
def test_a_resumed_fit_ends_with_the_same_values(tmp_path, epochs, channels):
    settings = {"quantization": replace(CODEBOOK, codebook_channels=channels)}
    whole, _ = fit(tmp_path / "whole", [shared(tmp_path / "whole", **settings)])
    checkpoint = tmp_path / "part.ckpt"
    fit(tmp_path / "part", [shared(tmp_path / "part", **settings), Stop(epochs, checkpoint)])

    resumed, _ = fit(tmp_path / "again", [shared(tmp_path / "again", **settings)], ckpt_path=checkpoint)

    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    plan = plan_of(torch.load(checkpoint, weights_only=False))
    assert plan.codebooks.keys() == plan.allocation.bits.keys()


def test_blocks_of_channels_have_values_of_their_own_in_every_format(tmp_path):
    quantization = replace(CODEBOOK, codebook_channels=2)
    run = shared(
        tmp_path, quantization=quantization, bits=(3,), average_bits=3.0, formats=["safetensors", "onnx", "pt2"]
    )

    model, _ = fit(tmp_path, [run])

    weight = model.second.weight.detach()
    assert all(len(block.unique()) <= 7 for block in weight.split(2))
    assert len(weight.unique()) > 7
    assert_files_hold(model, tmp_path)


@pytest.mark.parametrize(
    ("settings", "quantization", "text"),
    [
        ({"structure": "channel"}, {"codebook_channels": 4}, "blocks would not be whole any more once channels go"),
        ({}, {"codebook_channels": 3}, r"cuts the output channels of no weight into blocks: they have \[4, 8\]"),
        ({}, {"sensitivity": "absolute"}, r"add Scoring\(statistics=\('rms', 'absolute'\)\)"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(tmp_path, settings, quantization, text):
    model = ToyNet()

    with pytest.raises(ValueError, match=text):
        fit(tmp_path, [shared(tmp_path, quantization=replace(CODEBOOK, **quantization), **settings)], model)
    assert model.losses == []


def test_it_goes_together_with_channels_and_a_merged_batchnorm(tmp_path):
    pytest.importorskip("torch_pruning")
    run = shared(
        tmp_path,
        structure="channel",
        channels=Channels(channels=0.7, multiple=1, steps=2),
        formats=["safetensors", "onnx"],
        files=Files(float16=True, merge_batchnorm=True),
        pruning=Pruning(steps=2),
    )

    model, _ = fit(tmp_path, [run])

    small = load_compressed(tmp_path / "model.safetensors", ToyNet()).eval()
    x = Corners().data.tensors[0]
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-3, atol=1e-3)
    assert small.first.out_channels + small.second.out_channels < 16
    assert len(small.second.weight.unique()) <= 15


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"quantizer": "kmeans"}, "quantizer must be 'uniform' or 'codebook', got 'kmeans'"),
        ({"quantizer": "codebook"}, "use it with bits_per='layer' and without activations, got bits_per='channel'"),
        (
            {"quantizer": "codebook", "bits_per": "layer", "activations": "int8"},
            "without activations, got bits_per='layer' and activations='int8'",
        ),
        ({"codebook_channels": 4}, "codebook_channels=4 needs quantizer='codebook', got 'uniform'"),
        (
            {"quantizer": "codebook", "bits_per": "layer", "codebook_channels": 0},
            "codebook_channels must be >= 1, got 0",
        ),
        ({"strategy": "ranked", "sensitivity": "absolute"}, "goes by relevance itself: use sensitivity='relevance'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        Quantization(**settings)


def test_integer_kernels_are_refused_before_training(tmp_path):
    model = ToyNet()
    run = shared(tmp_path, formats=["onnx"], files=Files(activations="int8"))

    with pytest.raises(
        ValueError, match=r"Files\(activations='int8'\) computes on integers, which a codebook's values"
    ):
        fit(tmp_path, [run], model)
    assert model.losses == []
