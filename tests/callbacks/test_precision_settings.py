"""Who gets how many bits, in fits: strategies, groups, sensitivities and widths by name."""

import json

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lightning_xai_compress import (
    Files,
    MixedPrecision,
    Pruning,
    Quantization,
    RelevanceScoring,
    Scoring,
    XAICompression,
    allocate_bits,
)
from lightning_xai_compress.callbacks import precision
from lightning_xai_compress.callbacks.scorer import Scorer

from toy import Corners, ToyNet, compression, fit, watch_scores

FAST = {"sparsity": 0.3, "warmup": 0, "pruning_end": "6 steps", "pruning": Pruning(steps=2)}


def quick(folder, **settings):
    """Two epochs of four batches: pruning at batches 0 and 3, quantized at batch 6."""
    quantization = Quantization(
        **{key: settings.pop(key) for key in [*settings] if key in Quantization.__dataclass_fields__}
    )
    callback = compression(folder, **(FAST | {"quantization": quantization} | settings))
    model, _ = fit(folder, [callback], max_epochs=2)
    return model, callback


def watch_allocation(monkeypatch):
    """What every allocation of a fit was given and what it found."""
    calls = []

    def watched(weights, scores, **settings):
        copies = {name: each.clone() for name, each in weights.items()}
        calls.append((copies, scores, settings, allocate_bits(weights, scores, **settings)))
        return calls[-1][-1]

    monkeypatch.setattr(precision, "allocate_bits", watched)
    return calls


def watch_passes(monkeypatch):
    """Criterion and start of every scoring pass over training samples."""
    passes = []
    training_samples = Scorer.training_samples

    def watched(scorer, batch, **others):
        passes.append((others.get("criterion") or scorer.criterion, others.get("explain") or scorer.settings.explain))
        return training_samples(scorer, batch, **others)

    monkeypatch.setattr(Scorer, "training_samples", watched)
    return passes


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "ranked"},
        {"bits_per": "layer"},
        {"bits_per": "group", "group_size": 4},
        {"strategy": "ranked", "bits_per": "group", "group_size": 8, "sensitivity": "fisher"},
        {"sensitivity": "error", "widths": {"head": 6}},
    ],
    ids=str,
)
def test_a_resumed_fit_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path, settings):
    """Checkpoints after batch 4 (before widths are chosen at batch 6) and after batch 8 (after it)."""
    made = {"quantization": Quantization(**settings), **FAST}
    folder = tmp_path / "whole"
    saver = ModelCheckpoint(dirpath=folder / "ckpt", filename="{step}", save_top_k=-1, every_n_epochs=1)
    model, _ = fit(folder, [compression(folder, **made), saver], max_epochs=3, enable_checkpointing=True)

    for step in (4, 8):
        again = tmp_path / f"from {step}"
        checkpoint = str(folder / "ckpt" / f"step={step}.ckpt")
        resumed, _ = fit(again, [compression(again, **made)], ckpt_path=checkpoint, max_epochs=3)

        assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        histories = [json.loads((each / "report.json").read_text())["history"] for each in (folder, again)]
        assert histories[0] == histories[1]
        for name, tensor in model.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name


def test_the_settings_reach_the_allocation_and_the_gap_reaches_the_report(tmp_path, monkeypatch):
    calls = watch_allocation(monkeypatch)

    quick(tmp_path, bits_per="group", group_size=4, strategy="ranked", widths={"first*": 5})

    ((_, _, settings, found),) = calls
    assert {key: settings[key] for key in ("strategy", "bits_per", "group_size", "widths", "average_bits", "bits")} == {
        "strategy": "ranked",
        "bits_per": "group",
        "group_size": 4,
        "widths": {"first*": 5},
        "average_bits": 3.0,
        "bits": (2, 3, 4, 6, 8),
    }
    (event,) = [
        each for each in json.loads((tmp_path / "report.json").read_text())["history"] if each["event"] == "quantized"
    ]
    assert event["gap"] == found.gap > 0
    assert event["average_bits"] == found.allocation.average_bits


def test_groups_of_input_channels_are_on_grids_of_their_own_and_in_the_file(tmp_path):
    model, callback = quick(tmp_path, bits_per="group", group_size=4)

    plan = callback.session.latent.plan()
    assert {name: len(each) for name, each in plan.allocation.bits.items()} == {
        "first.weight": 8,  # one input channel: one group
        "second.weight": 16,
        "head.weight": 32,
    }
    assert plan.allocation.average_bits <= 3.0
    rows = model.second.weight.detach().reshape(16, 36)
    codes = rows / plan.scales["second.weight"].clamp(min=1e-30).unsqueeze(1)
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert (codes.round().abs().amax(1) <= 2.0 ** (plan.allocation["second.weight"].float() - 1) - 1).all()
    assert callback.report.artifacts[0].max_abs_diff == 0


def test_layers_have_one_width_each(tmp_path):
    _, callback = quick(tmp_path, bits_per="layer")

    bits = callback.session.latent.plan().allocation.bits
    assert all(len(set(each.tolist())) == 1 for each in bits.values())


def test_fixed_widths_are_kept_and_leave_the_rest_of_the_budget(tmp_path):
    _, callback = quick(tmp_path, widths={"head": 8, "first*": 5}, average_bits=3.5)

    plan = callback.session.latent.plan()
    assert set(plan.allocation["head.weight"].tolist()) == {8}
    assert set(plan.allocation["first.weight"].tolist()) == {5}
    assert 3.3 < plan.allocation.average_bits <= 3.5


# --- sensitivity


def test_fisher_takes_a_pass_of_its_own_from_the_margin(tmp_path, monkeypatch):
    passes, calls = watch_passes(monkeypatch), watch_allocation(monkeypatch)
    leading = RelevanceScoring(scoring=Scoring(samples=32, explain="logit"))
    stage = MixedPrecision(average_bits=3.0, start="2 steps", quantization=Quantization(sensitivity="fisher"))

    fit(tmp_path, [leading, stage], max_epochs=1)

    assert passes == [("fisher", "margin")]
    ((weights, scores, _, found),) = calls
    assert set(scores.sensitivity) == set(weights)
    assert scores.samples == 32
    assert leading.session.latent.plan().allocation.average_bits == found.allocation.average_bits


def test_fisher_is_the_mean_square_of_the_gradients_of_single_samples(tmp_path, monkeypatch):
    """All 64 training samples, one by one, at the weights that were allocated."""
    calls = watch_allocation(monkeypatch)
    quick(
        tmp_path,
        sensitivity="fisher",
        sparsity=0.0,
        warmup="1 steps",
        pruning_end="1 steps",
        scoring=Scoring(samples=64),
    )
    ((weights, scores, _, _),) = calls

    model = ToyNet()
    torch.manual_seed(0)
    reference, _ = fit(tmp_path / "one step", [], max_steps=1, max_epochs=-1)
    model.load_state_dict(reference.state_dict())
    model.eval()
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight)
    squares = {name: torch.zeros_like(each) for name, each in weights.items()}
    for image, label in zip(*Corners().data.tensors, strict=True):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(image.unsqueeze(0)), label.unsqueeze(0)).backward()
        for name in squares:
            squares[name] += model.get_parameter(name).grad ** 2 / 64
    for name, expected in squares.items():
        # the margin is onehot - softmax held fixed, times the logits: its gradient is that of the cross-entropy
        assert torch.allclose(scores.sensitivity[name], expected, rtol=1e-3, atol=1e-9), name


def test_the_criterion_fisher_needs_no_second_pass(tmp_path, monkeypatch):
    passes, scores = watch_passes(monkeypatch), watch_scores(monkeypatch)
    calls = watch_allocation(monkeypatch)

    quick(tmp_path, sensitivity="fisher", criterion="fisher")

    assert passes == [("fisher", "margin")] * 3
    assert calls[0][1] is scores[-1]


def test_error_alone_makes_no_pass(tmp_path, monkeypatch):
    passes, calls = watch_passes(monkeypatch), watch_allocation(monkeypatch)

    quick(tmp_path, sensitivity="error")

    assert len(passes) == 2  # of pruning
    assert calls[0][1] is None


def test_a_fisher_pass_that_fails_leaves_the_weights_as_they_are(tmp_path, monkeypatch):
    training_samples = Scorer.training_samples

    def failing(scorer, batch, **others):
        if others:
            raise precision.RelevanceError("no such luck")
        return training_samples(scorer, batch, **others)

    monkeypatch.setattr(Scorer, "training_samples", failing)

    with pytest.warns(UserWarning, match="weights could not be scored for their widths: no such luck"):
        _, callback = quick(tmp_path, sensitivity="fisher")

    assert not callback.session.latent.quantized
    assert callback.report.halted


# --- refused before training


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategy": "rank"}, "strategy must be 'knapsack' or 'ranked', got 'rank'"),
        ({"bits_per": "row"}, "bits_per must be 'layer', 'channel' or 'group', got 'row'"),
        ({"sensitivity": "hessian"}, "sensitivity must be 'relevance', 'absolute', 'fisher' or 'error', got 'hessian'"),
        ({"bits_per": "group"}, "bits_per='group' needs a group_size, .* group_size=None"),
        ({"group_size": 8}, "nothing else has one: got bits_per='channel' and group_size=8"),
        ({"bits_per": "group", "group_size": 0}, "group_size must be >= 1, got 0"),
        ({"bits_per": "group", "group_size": 2.5}, "group_size must be a whole number, got 2.5"),
        ({"strategy": "ranked", "sensitivity": "error"}, "ranks by relevance, which sensitivity='error' does without"),
        ({"widths": {"head*": 1}}, r"widths must be whole numbers in 2..8, got \{'head\*': 1\}"),
        ({"widths": "head*"}, r"widths must map patterns to bits such as \{'head\*': 8\}, got 'head\*'"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings, text):
    with pytest.raises(ValueError, match=text):
        Quantization(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"widths": {"haed*": 8}}, r"widths=\['haed\*'\] matches no weight that is quantized; those are: first.weight"),
        ({"widths": {"head*": 8}, "exclude": ["head"]}, r"widths=\['head\*'\] matches no weight"),
        (
            {"widths": {"second*": 8}},
            r"average_bits=3.0 cannot be met: widths fix second.weight at 8 bits; .* the mean 6.45",
        ),
        (
            {"bits_per": "group", "group_size": 5},
            r"group_size=5 divides the input channels of no weight into groups: they have \[1, 8, 32\]",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_training(tmp_path, settings, text):
    model = ToyNet()
    quantization = Quantization(**{key: each for key, each in settings.items() if key != "exclude"})
    callback = compression(tmp_path, quantization=quantization, exclude=settings.get("exclude", ()))

    with pytest.raises(ValueError, match=text):
        fit(tmp_path, [callback], model)
    assert not model.losses


def test_an_average_above_all_widths_is_refused_with_the_fixed_ones_named():
    with pytest.raises(ValueError, match=r"bits=\(2, 4\) and widths=\[6\], got 7"):
        MixedPrecision(average_bits=7, bits=(2, 4), quantization=Quantization(widths={"head*": 6}))
    assert MixedPrecision(average_bits=5, bits=(2, 4), quantization=Quantization(widths={"*": 6})).bits == (2, 4)


def test_a_fixed_width_that_the_onnx_file_may_not_hold_is_refused_before_training(tmp_path):
    model = ToyNet()
    callback = compression(
        tmp_path,
        formats=("onnx",),
        files=Files(onnx_bits=(2, 4)),
        bits=(2, 4),
        quantization=Quantization(widths={"head": 6}),
    )

    with pytest.raises(ValueError, match=r"\(widths=\{'head': 6\}\) asks for up to 6 bits, .* allows at most 4"):
        fit(tmp_path, [callback], model)
    assert not model.losses


def test_stages_alone_take_the_same_settings(tmp_path):
    stage = MixedPrecision(
        average_bits=4.0, start="2 steps", quantization=Quantization(widths={"head": 8}, strategy="ranked")
    )

    leading = RelevanceScoring(scoring=Scoring(samples=16))
    fit(tmp_path, [leading, stage], max_epochs=1)

    assert set(leading.session.latent.plan().allocation["head.weight"].tolist()) == {8}
    assert XAICompression(quantization=Quantization(widths={"head": 8})).stages()[2].quantization.widths == {"head": 8}


def test_a_config_and_the_command_line_hold_widths_by_name(tmp_path):
    given = {"bits_per": "group", "group_size": 4, "sensitivity": "fisher", "widths": {"head*": 8, "first*": 5}}
    quiet = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
    entry = {"class_path": "lightning_xai_compress.XAICompression", "init_args": {"quantization": given}}
    config, plain = tmp_path / "config.yaml", tmp_path / "plain.yaml"
    config.write_text(yaml.safe_dump({"trainer": quiet | {"callbacks": [entry]}}))
    plain.write_text(yaml.safe_dump({"trainer": quiet}))
    typed = [
        f"--trainer.callbacks.quantization.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in given.items()
    ]

    for arguments in (["-c", str(config)], ["-c", str(plain), "--trainer.callbacks+=XAICompression", *typed]):
        made = LightningCLI(ToyNet, Corners, run=False, args=arguments, save_config_callback=None)
        (callback,) = [each for each in made.trainer.callbacks if isinstance(each, XAICompression)]
        assert callback.stages()[2].quantization == Quantization(**given)
