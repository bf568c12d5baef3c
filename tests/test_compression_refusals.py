"""What `compress` refuses, and that the model is then as it was."""

import copy

import pytest
import torch
from torch import nn
from torchmetrics.classification import ConfusionMatrix, MulticlassAccuracy

from lightning_xai_compress import CompressionError, RelevanceError, compress, score
from lightning_xai_compress.pruning import Choice

from trained_net import TRAINING, VALIDATION, assert_equal, copies, dense

METRIC = {"metric": MulticlassAccuracy(4), "validation": VALIDATION}


@pytest.fixture
def model():
    return copy.deepcopy(dense())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one goal: .* Got none"),
        ({"target_size": 0.3, "max_drop": 1, **METRIC}, "give one goal: .* Got target_size=0.3, max_drop=1"),
        (
            {"target_size": 0.3, "sparsity": 0.5},
            "choose sparsity and bits themselves. Got target_size=0.3, sparsity=0.5",
        ),
        ({"max_drop": 1, "average_bits": 3, **METRIC}, "Got max_drop=1, average_bits=3"),
        ({"target_size": 1.5}, "target_size must be a share of the dense file between 0 and 1"),
        ({"target_size": 10**9}, "target_size=1000000000 bytes is no smaller than the dense file"),
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), got 1.0"),
        ({"average_bits": 9}, "average_bits must lie between the smallest and the largest of bits"),
        ({"sparsity": 0.5, "bits": [1]}, r"bits must be whole numbers in 2\.\.8"),
        ({"sparsity": 0.5, "steps": 0}, "steps must be >= 1, got 0"),
        ({"sparsity": 0.5, "selection": "literal"}, "selection must be 'least' or 'nonpositive', got 'literal'"),
        ({"sparsity": 0.5, "criterion": "lpr"}, "criterion must be one of lrp"),
        ({"sparsity": 0.5, "selection": "nonpositive", "criterion": "magnitude"}, "needs scores with a sign"),
        ({"sparsity": 0.5, "exclude": ["tail*"]}, r"exclude=\['tail\*'\] matches no layer"),
        ({"sparsity": 0.5, "choice": Choice(protect=["tail*"])}, r"protect=\['tail\*'\] matches no layer"),
        ({"max_drop": 0, **METRIC}, "max_drop must be positive"),
        ({"max_drop": 1}, "max_drop=1 needs metric= .* and validation="),
        ({"max_drop": 1, "metric": MulticlassAccuracy(4)}, "give validation=, too"),
        ({"max_drop": 1, "metric": "val_acc", "validation": VALIDATION}, "metric must be a torchmetrics metric"),
        (
            {"max_drop": 1, "metric": MulticlassAccuracy, "validation": VALIDATION},
            "metric must be a torchmetrics metric",
        ),
        ({"sparsity": 0.5, "validation": VALIDATION}, "mode and validation are of a metric"),
        ({"sparsity": 0.5, "mode": "max"}, "mode and validation are of a metric"),
        ({"max_drop": 1, "mode": "most", **METRIC}, "mode must be 'max' or 'min', got 'most'"),
        (
            {"max_drop": 1, "metric": ConfusionMatrix("multiclass", num_classes=4), "validation": VALIDATION},
            "needs mode=",
        ),
        (
            {"sparsity": 0.5, "metric": ConfusionMatrix("multiclass", num_classes=4), "validation": VALIDATION},
            "one number",
        ),
        ({"sparsity": 0.5, "metric": METRIC["metric"], "validation": []}, "no validation data to measure on"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_leave_the_model_as_it_was(model, settings, message):
    before = copies(model)

    with pytest.raises(ValueError, match=message):
        compress(model, TRAINING, **settings)

    assert_equal(copies(model), before)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches is empty"),
        (iter(()), ValueError, "batches is empty"),
        (None, ValueError, "batches must be batches"),
        ([torch.zeros(4, 1, 6, 6)], RelevanceError, "input and target of a batch were not found"),
        ([(torch.zeros(4, 1, 6, 6), torch.full((4,), 9))], RelevanceError, "the logits have 4 classes"),
    ],
)
def test_batches_that_cannot_be_are_refused(model, batches, error, message):
    with pytest.raises(error, match=message):
        compress(model, batches, sparsity=0.5)


def test_a_model_without_layers_is_refused():
    with pytest.raises(CompressionError, match="has nothing to compress"):
        compress(nn.ReLU(), TRAINING, sparsity=0.5)


def test_an_error_in_the_midst_puts_the_weights_back(model):
    before, calls = copies(model), []

    def criterion(model, batches, layers):
        calls.append(layers)
        if len(calls) == 3:
            raise ArithmeticError("third round")
        return score(model, batches, layers=layers)

    with pytest.raises(ArithmeticError, match="third round"):
        compress(model, TRAINING, sparsity=0.5, steps=4, criterion=criterion)

    assert_equal(copies(model), before)
