"""The whole way in a fit: masks, grids, files, report."""

import json
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import (
    CompressedExport,
    MixedPrecision,
    Pruning,
    RelevancePruning,
    RelevanceScoring,
    Scoring,
    load_compressed,
)

from toy import Corners, ToyNet, compression, fit


def test_a_fit_ends_pruned_quantized_and_exported(tmp_path):
    callback = compression(tmp_path, metric="val_acc", formats=("safetensors", "onnx"))

    model, _ = fit(tmp_path, [callback])

    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= {
        "dense", "compressed", "reduction", "sparsity", "average_bits", "artifacts", "layers", "skipped",
    }  # fmt: skip
    zeros = sum(int((dict(model.named_parameters())[layer["name"]] == 0).sum()) for layer in report["layers"])
    assert report["sparsity"] == 388 / 776
    assert zeros >= 388
    assert 2.8 < report["average_bits"] <= 3.0
    assert [layer["name"] for layer in report["layers"]] == ["first.weight", "head.weight", "second.weight"]
    for layer in report["layers"]:
        weight = dict(model.named_parameters())[layer["name"]]
        assert layer["weights"] == weight.numel()
        assert sum(layer["bits"].values()) == len(weight)
        assert 0 < layer["relevance"] < 1
        assert layer["bytes"] > 0
    assert report["dense"]["at_epoch"] == 2
    assert report["dense"]["accuracy"] > 0.5
    assert report["compressed"]["accuracy"] > 0.9
    assert report["reduction"] == 1 - report["compressed"]["bytes"] / report["dense"]["bytes"]

    packed, onnx = report["artifacts"]
    assert (packed["format"], packed["max_abs_diff"]) == ("safetensors", 0.0)
    assert packed["bytes"] == (tmp_path / "model.safetensors").stat().st_size == report["compressed"]["bytes"]
    assert onnx["max_abs_diff"] < 1e-4
    assert onnx["bytes"] == (tmp_path / "model.onnx").stat().st_size

    reloaded = load_compressed(tmp_path / "model.safetensors", ToyNet())
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name


def test_channels_hold_no_more_values_than_their_width_allows(tmp_path):
    callback = compression(tmp_path)
    model, _ = fit(tmp_path, [callback])

    plan = callback.session.latent.plan()
    for name, bits in plan.allocation.bits.items():
        for row, width in zip(dict(model.named_parameters())[name].detach().flatten(1), bits.tolist(), strict=True):
            assert len(row.unique()) <= 2**width - 1


def test_validation_metric_belongs_to_the_exported_weights(tmp_path):
    callback = compression(tmp_path, metric=MulticlassAccuracy(4, average="micro"))

    model, run = fit(tmp_path, [callback])

    again = run.validate(model, datamodule=Corners(), verbose=False)[0]["val_acc"]
    assert callback.report.compressed.accuracy == pytest.approx(again)
    assert callback.report.compressed.accuracy == pytest.approx(float(run.callback_metrics["val_acc"]))


def test_batchnorm_statistics_are_those_of_the_compressed_weights(tmp_path):
    """After the fit they equal the mean over the calibration batches, computed here without BatchNorm's own code."""
    callback = compression(tmp_path)
    model, _ = fit(tmp_path, [callback])

    x = torch.stack([image for image, _ in Corners().data])
    z = model.first(x).detach()
    # 64 samples in 4 batches: the mean over batch means is the mean over all
    torch.testing.assert_close(model.norm.running_mean, z.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not model.norm.training or model.norm.momentum == 0.1
    assert model.norm.momentum == 0.1


def test_sparsity_rises_along_the_cubic_ramp_and_never_falls(tmp_path):
    callback = compression(tmp_path, sparsity=0.6)
    fit(tmp_path, [callback])

    pruned = [event["sparsity"] for event in callback.report.history if event["event"] == "pruned"]
    expected = [0.6 * (1 - (1 - step / 6) ** 3) for step in range(1, 7)]
    assert pruned == pytest.approx(expected, abs=1 / 776)


def test_without_a_sparsity_only_nonpositive_weights_go(tmp_path):
    callback = compression(tmp_path, sparsity=None)
    fit(tmp_path, [callback])

    assert 0.3 < callback.report.sparsity < 0.7
    assert callback.report.positive_pruned == 0


def test_a_high_sparsity_takes_positive_weights_and_says_how_many(tmp_path, capsys):
    callback = compression(tmp_path, sparsity=0.95, pruning=Pruning(steps=2))
    fit(tmp_path, [callback])

    assert callback.report.sparsity == pytest.approx(0.95, abs=1e-3)
    assert callback.report.positive_pruned > 0
    assert f"{callback.report.positive_pruned} of the pruned weights had positive relevance" in capsys.readouterr().out


def test_least_takes_the_smallest_whatever_the_sign(tmp_path):
    callback = compression(tmp_path, selection="least", sparsity=0.5)
    fit(tmp_path, [callback])

    assert callback.report.sparsity == 0.5
    assert callback.report.positive_pruned > 50


def test_excluded_layers_stay_float_and_are_named(tmp_path):
    callback = compression(tmp_path, exclude=["first", "head*"])
    model, _ = fit(tmp_path, [callback])

    assert [layer.name for layer in callback.report.layers] == ["second.weight"]
    reasons = {entry.name: entry.reason for entry in callback.report.skipped}
    assert reasons == {"first": "excluded by 'first'", "head": "excluded by 'head*'"}
    assert len(model.head.weight.unique()) == model.head.weight.numel()


class Recurrent(ToyNet):
    """An LSTM over the rows, and a Linear that the loss never meets."""

    def __init__(self):
        super().__init__()
        del self.first, self.norm, self.second
        self.rnn = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.idle = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x.squeeze(1))[0].mean(1))


def test_recurrent_layers_are_skipped_and_unreached_ones_kept_both_by_name(tmp_path):
    model = Recurrent()
    callback = compression(tmp_path, sparsity=0.5, average_bits=6.0, bits=(4, 8))
    fit(tmp_path, [callback], model)

    reasons = {entry.name: entry.reason for entry in callback.report.skipped}
    assert "recurrent layer" in reasons["rnn"]
    assert "relevance unknown" in reasons["idle"]
    layers = {layer.name: layer for layer in callback.report.layers}
    assert layers["idle.weight"].sparsity == 0
    assert layers["idle.weight"].bits == {8: 2}
    assert layers["idle.weight"].relevance is None
    assert layers["head.weight"].sparsity > 0


def test_relevance_epochs_decide_when_relevance_is_computed(tmp_path):
    callback = compression(tmp_path, relevance_epochs=[1, 3], warmup=2, pruning_end=5)
    fit(tmp_path, [callback])

    assert [event["epoch"] for event in callback.report.history if event["event"] == "scored"] == [1, 3]


def test_every_second_epoch_is_scored(tmp_path):
    callback = compression(tmp_path, relevance_epochs=2)
    fit(tmp_path, [callback])

    assert [event["epoch"] for event in callback.report.history if event["event"] == "scored"] == [0, 2, 4, 6]


def test_a_trained_model_needs_no_warmup(tmp_path):
    callback = compression(tmp_path, warmup=0.0)
    fit(tmp_path, [callback])

    assert callback.report.history[0]["event"] == "pruned"
    assert callback.report.history[0]["epoch"] == 0
    assert callback.report.dense.at_epoch == 0


# --- stages alone


def test_pruning_alone_scores_for_itself(tmp_path):
    stage = RelevancePruning(sparsity=0.5, pruning=Pruning(steps=4))
    model, _ = fit(tmp_path, [stage])

    zeros = sum(
        int((parameter == 0).sum()) for parameter in (model.first.weight, model.second.weight, model.head.weight)
    )
    assert zeros == 388


def test_mixed_precision_alone_prunes_nothing(tmp_path):
    stage = MixedPrecision(average_bits=4.0, start=0.5)
    fit(tmp_path, [stage])

    plan = stage.session.latent.plan()
    assert plan.mask.sparsity == 0
    assert 3.5 < plan.allocation.average_bits <= 4.0


def test_scoring_alone_gives_scores_at_every_epoch_and_changes_nothing(tmp_path):
    plain, _ = fit(tmp_path, [])
    stage = RelevanceScoring(scoring=Scoring(samples=32))
    scored, _ = fit(tmp_path, [stage])

    assert stage.scores.samples == 32
    assert len(stage.session.history) == 8
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, scored.state_dict()[name]), name


@pytest.mark.parametrize("order", [1, -1])
def test_stages_together_equal_the_all_in_one_in_any_order(tmp_path, order):
    whole, _ = fit(tmp_path / "whole", [compression(tmp_path / "whole")])
    stages = [
        RelevanceScoring(scoring=Scoring(samples=32)),
        RelevancePruning(sparsity=0.5, pruning=Pruning(steps=6)),
        MixedPrecision(average_bits=3.0),
        CompressedExport(export_dir=str(tmp_path / "stages")),
    ][::order]
    parts, _ = fit(tmp_path / "stages", stages)

    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "stages/model.safetensors").read_bytes()


def test_the_best_checkpoint_can_be_tested_after_the_fit(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="val_acc", mode="max")
    model, run = fit(tmp_path, [compression(tmp_path), checkpoint], enable_checkpointing=True)

    assert run.validate(model, datamodule=Corners(), ckpt_path="best", verbose=False)[0]["val_acc"] > 0.5


@pytest.mark.parametrize("order", [1, -1])
def test_the_latest_scores_can_be_read_wherever_the_scoring_stands_in_the_list(tmp_path, order):
    scoring = RelevanceScoring(relevance_epochs=[2], scoring=Scoring(samples=32))
    pruning = RelevancePruning(sparsity=0.3, pruning=Pruning(steps=2), start=2, end=3)
    fit(tmp_path, [scoring, pruning][::order], max_epochs=4)

    assert scoring.scores.samples == 32
    assert pickle.loads(pickle.dumps(scoring)).scores is None
