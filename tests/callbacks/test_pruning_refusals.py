"""Settings of `Pruning` that are refused, when they are made or before the first batch, and how a config gives them."""

import re

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from lightning_xai_compress import Pruning, RelevancePruning, Scoring, XAICompression, score

from toy import Corners, ToyNet, compression, fit


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "pruning steps must be >= 1, got 0"),
        ({"rescore_every": 0}, "rescore_every must be >= 1, got 0"),
        ({"rescore_every": 1.5}, "rescore_every must be a whole number, got 1.5"),
        ({"schedule": "exponential"}, "schedule must be one of one_shot, linear, cubic, stepwise, got 'exponential'"),
        ({"schedule": "stepwise"}, "milestones and schedule='stepwise' go together"),
        ({"milestones": [(2, 0.5)]}, "milestones and schedule='stepwise' go together"),
        ({"schedule": "stepwise", "milestones": [2, 4]}, "milestones must be pairs of a moment and a sparsity"),
        ({"schedule": "stepwise", "milestones": [(2, 1.0)]}, "sparsity of a milestone must lie in (0, 1), got 1.0"),
        ({"schedule": "stepwise", "milestones": [(-2, 0.5)]}, "milestone must not be negative, got -2"),
        ({"schedule": "stepwise", "milestones": [(2, 0.5), (3, 0.5)]}, "the sparsity of milestones must rise"),
        ({"scope": "row"}, "scope must be 'global' or 'layer', got 'row'"),
        ({"floor": -0.1}, "must lie in [0, 1), got -0.1"),
        ({"normalization": "l2"}, "normalization must be None or 'lamp', got 'l2'"),
        ({"confidence": 1.0}, "confidence must be None or lie in [0.5, 1), got 1.0"),
        ({"protect": "head"}, "protect must be a list of strings such as ['head'], got 'head'"),
        ({"protect_ends": 1}, "protect_ends must be True or False, got 1"),
        ({"fresh_batchnorm": "yes"}, "fresh_batchnorm must be True or False, got 'yes'"),
    ],
)
def test_settings_out_of_range_are_refused_when_made(settings, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        Pruning(**settings)


def test_a_sparsity_beside_literal_and_beside_other_milestones_is_refused_when_made():
    with pytest.raises(ValueError, match=re.escape("selection='literal' prunes the whole set, and no sparsity: leave")):
        XAICompression(selection="literal", sparsity=0.5)
    steps = Pruning(schedule="stepwise", milestones=[(2, 0.5)])
    with pytest.raises(ValueError, match=re.escape("the last milestone has sparsity 0.5, but sparsity=0.8")):
        XAICompression(sparsity=0.8, pruning=steps)


def stepwise(*milestones):
    return {"schedule": "stepwise", "milestones": milestones}


@pytest.mark.parametrize(
    ("settings", "more", "text"),
    [
        ({"protect": ["nothing*"]}, {}, "protect=['nothing*'] matches no layer that is compressed; names look like: "),
        ({"protect": ["second"]}, {}, "sparsity=0.5 cannot be met: only 195 of the 776 compressible weights (25.13%)"),
        ({"protect": ["*"]}, {"sparsity": None}, "pruning cannot be met: only 0 of the 776 compressible weights"),
        ({"floor": 0.6}, {}, "sparsity=0.5 cannot be met: only 309 of the 776"),
        ({}, {"sparsity": 0.999}, "only 770 of the 776 compressible weights (99.23%) can go"),
        ({"rescore_every": 2}, {"relevance_epochs": 1}, "relevance_epochs and rescore_every=2 both say when"),
        ({"confidence": 0.9}, {}, "confidence=0.9 needs a standard error: add Scoring(statistics=("),
        (
            {"confidence": 0.9},
            {"selection": "least", "scoring": Scoring(statistics=("standard_error",)), "criterion": "taylor"},
            "confidence=0.9 is of the sign of relevance: use selection='nonpositive'",
        ),
        (stepwise((1, 0.5)), {}, "reach beyond pruning, which starts at 0.25 (epoch 2) and ends at 0.6"),
        (stepwise((2, 0.2), (6, 0.5)), {}, "reach beyond pruning"),
        (stepwise((4, 0.2), (3, 0.5)), {}, "milestones must follow each other in time"),
        (stepwise((2, 0.2), ("999 steps", 0.5)), {}, "milestone=999 steps lies past the end of the fit"),
        ({}, {"selection": "literal", "sparsity": None, "criterion": "wanda"}, "need scores with a sign"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_its_first_batch(tmp_path, settings, more, text):
    model = ToyNet()
    data = Corners(samples=1024, batch_size=16)
    with pytest.raises(ValueError, match=re.escape(text)):
        fit(tmp_path, [compression(tmp_path, pruning=Pruning(**settings), **more)], model, data)
    assert model.losses == []


def test_a_function_of_ones_own_without_a_standard_error_is_refused_beside_confidence(tmp_path):
    def mine(model, batches, layers):
        return score(model, batches, layers=layers)

    model, settings = ToyNet(), Pruning(confidence=0.9)
    with pytest.raises(ValueError, match=re.escape("confidence=0.9 needs a standard error")):
        fit(tmp_path, [compression(tmp_path, criterion=mine, pruning=settings)], model)
    assert model.losses == []


def test_a_config_nests_all_settings():
    parser = LightningArgumentParser()
    parser.add_class_arguments(XAICompression, "c")
    settings = {
        "schedule": "stepwise", "milestones": [[2, 0.5], ["1500 steps", 0.8]], "rescore_every": 2, "scope": "layer",
        "floor": 0.05, "confidence": 0.9, "normalization": "lamp", "protect": ["head*"], "protect_ends": True,
    }  # fmt: skip

    config = parser.parse_object({"c": {"sparsity": 0.8, "pruning": settings}})

    stage = next(each for each in parser.instantiate_classes(config).c.stages() if isinstance(each, RelevancePruning))
    expected = {**settings, "milestones": ((2, 0.5), ("1500 steps", 0.8)), "protect": ("head*",)}
    assert {name: getattr(stage.pruning, name) for name in settings} == expected
