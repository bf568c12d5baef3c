"""One argument changes what a fit goes by: in the callback, in the stages and in YAML."""

import copy
import json

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from zennit.composites import EpsilonPlus
from zennit.rules import ReLUDeconvNet

from lightning_xai_compress import (
    CompressedExport,
    MixedPrecision,
    Pruning,
    RelevanceError,
    RelevancePruning,
    RelevanceScoring,
    Scoring,
    XAICompression,
    score,
)
from lightning_xai_compress.criteria import CRITERIA

from toy import Corners, ToyNet, compression, fit


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_fit_goes_by_any_criterion(tmp_path, criterion):
    run = compression(tmp_path, criterion=criterion)

    model, _ = fit(tmp_path, [run])

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["criterion"] == criterion
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert report["average_bits"] <= 3.0
    weights = torch.cat([layer.weight.flatten() for layer in (model.first, model.second, model.head)])
    assert float((weights == 0).float().mean()) >= 0.499


def test_criteria_prune_different_weights(tmp_path):
    zeros = {}
    for criterion in ("lrp", "magnitude", "random"):
        model, _ = fit(tmp_path, [compression(tmp_path, criterion=criterion, selection="least")])
        zeros[criterion] = (model.second.weight == 0).flatten()

    assert not torch.equal(zeros["lrp"], zeros["magnitude"])
    assert not torch.equal(zeros["random"], zeros["magnitude"])


def test_magnitude_prunes_the_smallest_weights(tmp_path):
    stages = [RelevanceScoring(criterion="magnitude"), RelevancePruning(sparsity=0.5, start=0.0, end=0.0)]
    model = ToyNet(lr=0.0, momentum=0.0)
    before = torch.cat([each.weight.detach().flatten() for each in (model.first, model.head, model.second)])

    fit(tmp_path, stages, model, max_epochs=1)

    after = torch.cat([each.weight.detach().flatten() for each in (model.first, model.head, model.second)])
    smallest = before.abs().argsort()[: len(before) // 2]
    assert torch.equal((after == 0).nonzero().flatten(), smallest.sort().values)


def rows_first(model, batches, layers):
    weights = dict(model.named_parameters())
    return {name: torch.arange(weights[name].numel()).view_as(weights[name]).float() for name in layers}


def test_a_function_of_ones_own_decides_what_goes(tmp_path):
    run = compression(tmp_path, criterion=rows_first, sparsity=0.25)

    model, _ = fit(tmp_path, [run])

    assert run.report.criterion == "rows_first"
    first = (model.first.weight == 0).flatten()
    assert first.sum() > 0
    assert bool(first[: int(first.sum())].all())  # the first of each layer


def test_without_a_sign_the_smallest_scores_go_first(tmp_path):
    run = compression(tmp_path, criterion="magnitude")
    fit(tmp_path, [run])

    assert run.report.positive_pruned > 0  # scores without a sign count as positive


@pytest.mark.parametrize(
    "settings", [{"selection": "nonpositive"}, {"sparsity": None}, {"selection": "nonpositive", "sparsity": None}]
)
def test_pruning_what_is_non_positive_needs_a_sign(tmp_path, settings):
    with pytest.raises(ValueError, match="need scores with a sign, which this criterion does not give"):
        fit(tmp_path, [compression(tmp_path, criterion="wanda", **settings)])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"criterion": "taylr"}, "criterion must be one of lrp"),
        ({"scoring": lambda: Scoring(composite="epsilon_flat")}, "composite must be one of epsilon"),
        ({"scoring": lambda: Scoring(composite="epsilon_gamma_box")}, "needs the range of the input"),
        ({"scoring": lambda: Scoring(attention="half")}, "attention must be 'attnlrp' or 'cp'"),
        ({"scoring": lambda: Scoring(statistics=["median"])}, "statistics must be a list of some of rms"),
        ({"scoring": lambda: Scoring(baseline=float("nan"))}, "baseline must be finite"),
        ({"scoring": lambda: Scoring(baseline="median")}, "baseline must be a number, 'mean', 'blurred'"),
    ],
)
def test_settings_are_refused_when_they_are_made(settings, text):
    with pytest.raises(ValueError, match=text):
        XAICompression(**{name: value() if callable(value) else value for name, value in settings.items()})


def test_a_rule_without_weights_is_refused_before_training(tmp_path):
    composite = EpsilonPlus()
    composite.layer_map.append(((nn.BatchNorm2d,), ReLUDeconvNet()))
    composite.layer_map.insert(0, ((nn.BatchNorm2d,), ReLUDeconvNet()))
    model = ToyNet()

    with pytest.raises(RelevanceError, match=r"rule ReLUDeconvNet at norm \(BatchNorm2d\) has no per-weight form"):
        fit(tmp_path, [compression(tmp_path, scoring=Scoring(samples=32, composite=composite))], model)
    assert model.losses == []


def test_the_settings_of_scoring_reach_the_scores(tmp_path):
    torch.manual_seed(0)
    model, data = ToyNet(), Corners().data.tensors
    expected = score(model, [data], composite="epsilon_plus")
    scores = {}
    for label, scoring in {
        "epsilon": Scoring(samples=64),
        "plus": Scoring(samples=64, composite="epsilon_plus"),
        "zennit": Scoring(samples=64, composite=EpsilonPlus()),
        "predicted": Scoring(samples=64, explain="predicted", statistics=("absolute",)),
    }.items():
        stage = RelevanceScoring(relevance_epochs=[0], scoring=scoring)
        fit(tmp_path, [stage], copy.deepcopy(model), max_epochs=1)
        scores[label] = stage.scores

    for name, each in expected.score.items():
        torch.testing.assert_close(scores["plus"].score[name], each, rtol=1e-4, atol=1e-9)
        assert torch.equal(scores["zennit"].score[name], scores["plus"].score[name])
    assert not torch.allclose(scores["epsilon"].score["first.weight"], scores["plus"].score["first.weight"])
    assert scores["predicted"].absolute.keys() == expected.score.keys()
    assert scores["predicted"].rms == {}


def test_deeplift_compares_with_the_mean_of_the_training_samples(tmp_path):
    torch.manual_seed(0)
    model, data = ToyNet(), Corners().data.tensors
    stage = RelevanceScoring(relevance_epochs=[0], criterion="deeplift", scoring=Scoring(samples=64, baseline="mean"))

    fit(tmp_path, [stage], copy.deepcopy(model), max_epochs=1)

    expected = score(model, [data], "deeplift", baseline=data[0].mean(0))
    for name, each in expected.score.items():
        torch.testing.assert_close(stage.scores.score[name], each, rtol=1e-4, atol=1e-9)


def test_samples_of_several_shapes_have_no_mean_and_are_refused_before_training(tmp_path):
    class Growing(Corners):
        def train_dataloader(self):
            x, y = self.data.tensors
            whole = [(x[:16], y[:16]), (torch.cat([x[16:32], x[16:32]], dim=-1), y[16:32])]
            return torch.utils.data.DataLoader(whole, batch_size=None)

    model = ToyNet()
    stage = RelevanceScoring(criterion="deeplift", scoring=Scoring(samples=64, baseline="mean"))

    with pytest.raises(RelevanceError, match="baseline='mean' needs samples of one shape, but batch"):
        fit(tmp_path, [stage], model, data=Growing())
    assert model.losses == []


def test_a_standard_error_needs_enough_batches_before_training(tmp_path):
    stage = RelevanceScoring(scoring=Scoring(samples=64, statistics=("rms", "standard_error")))

    with pytest.raises(ValueError, match="need at least 8 batches, but samples=64 are 4 of this loader's"):
        fit(tmp_path, [stage])


def test_what_is_non_positive_with_confidence_can_be_asked_for(tmp_path):
    scoring = Scoring(samples=64, statistics=("rms", "standard_error"))
    stage = RelevanceScoring(relevance_epochs=[3], scoring=scoring)

    fit(tmp_path, [stage], data=Corners(batch_size=8), max_epochs=4)

    by_mean, sure = stage.scores.nonpositive(), stage.scores.nonpositive(confidence=0.95)
    counts = [sum(int(each.sum()) for each in tensors.values()) for tensors in (by_mean, sure)]
    assert 0 < counts[1] < counts[0]


def test_logits_that_are_all_negative_stop_pruning_but_not_the_fit(tmp_path):
    class Negative(ToyNet):
        def forward(self, x):
            return super().forward(x) - 1e4

    run = compression(tmp_path, scoring=Scoring(samples=32, explain="logit"))

    with pytest.warns(UserWarning, match="weights could not be scored: all 32 explained logits are <= 0"):
        fit(tmp_path, [run], Negative)
    assert run.report.sparsity == 0


def test_images_end_with_a_picture_of_what_the_model_looks_at(tmp_path):
    run = compression(tmp_path)

    fit(tmp_path, [run])

    assert run.report.heatmaps == "relevance.png"
    assert (tmp_path / "relevance.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_fails_does_not_cost_the_report(tmp_path, monkeypatch):
    def fail(heatmaps, path):
        raise TypeError("no such palette")

    monkeypatch.setattr("lightning_xai_compress.callbacks.export.save_heatmaps", fail)
    run = compression(tmp_path)

    fit(tmp_path, [run])

    assert run.report.heatmaps == ""
    assert [(each.name, each.reason) for each in run.report.failed] == [("relevance.png", "no such palette")]
    assert (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "criterion"),
    [
        (["--c.criterion=taylor"], "taylor"),
        (["--c.criterion=lightning_xai_compress.criteria.score"], "lightning_xai_compress.criteria.score"),
    ],
)
def test_a_config_names_the_criterion(arguments, criterion):
    parser = LightningArgumentParser()
    parser.add_class_arguments(XAICompression, "c")

    config = parser.parse_args(arguments)

    assert config.c.criterion == criterion
    assert parser.instantiate_classes(config).c.stages()[0].criterion == criterion


def test_a_config_nests_a_composite_by_name_or_class():
    parser = LightningArgumentParser()
    parser.add_class_arguments(XAICompression, "c")

    by_name = parser.parse_args(["--c.scoring.composite=epsilon_plus"])
    by_class = parser.parse_object(
        {
            "c": {
                "scoring": {"composite": {"class_path": "zennit.composites.EpsilonPlus", "init_args": {"epsilon": 0.1}}}
            }
        }
    )

    assert parser.instantiate_classes(by_name).c.stages()[0].scoring.composite == "epsilon_plus"
    assert isinstance(parser.instantiate_classes(by_class).c.stages()[0].scoring.composite, EpsilonPlus)


def test_stages_alone_go_by_the_criterion_of_scoring(tmp_path):
    stages = [
        RelevanceScoring(criterion="fisher", scoring=Scoring(samples=32)),
        RelevancePruning(sparsity=0.5, pruning=Pruning(steps=6)),
        MixedPrecision(average_bits=3.0),
        CompressedExport(export_dir=str(tmp_path / "stages")),
    ]
    fit(tmp_path, stages)
    fit(tmp_path, [compression(tmp_path / "one", criterion="fisher")])

    files = [tmp_path / folder / "model.safetensors" for folder in ("stages", "one")]
    assert files[0].read_bytes() == files[1].read_bytes()
