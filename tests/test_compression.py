"""`compress`: a trained model becomes small in one call, without a Trainer, and is otherwise as it was found."""

import copy
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import (
    BudgetError,
    Files,
    compress,
    load_compressed,
    save,
    score,
)
from lightning_xai_compress.pruning import Choice

from trained_net import TRAINING, VALIDATION, assert_equal, copies, dense, samples

BITS = (2, 4, 8)


@pytest.fixture
def model():
    return copy.deepcopy(dense())


@pytest.fixture
def trained():
    return dense()


def accuracy(model, batches=VALIDATION):
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / sum(len(y) for _, y in batches)


def saved(model, result, folder, formats=("safetensors",)):
    """The bytes of the packed file, after proof that it gives the model back."""
    artifacts = save(model, result.plan, folder, formats=formats, examples=[])
    assert_equal(load_compressed(folder / "model.safetensors"), copies(model))
    return artifacts[0].bytes


# --- a size


@pytest.mark.parametrize(
    "settings",
    [
        {"target_size": 0.29, "steps": 1},
        {"target_size": 1500, "files": Files(float16=True, merge_batchnorm=True), "steps": 1},
        {
            "target_size": 0.24,
            "bits": (4,),
            "criterion": "magnitude",
            "choice": Choice(scope="layer", floor=0.1),
            "steps": 1,
        },
        {"target_size": 0.26, "selection": "nonpositive", "exclude": ["head"], "bits": (2, 4)},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_the_written_file_has_the_size_that_was_asked_for_and_gives_the_model_back(model, tmp_path, settings):
    result = compress(model, TRAINING, **{"bits": BITS, **settings})

    wanted = settings["target_size"]
    wanted = wanted if isinstance(wanted, int) else int(wanted * result.report.dense.bytes)
    written = saved(model, result, tmp_path)
    assert 0.98 * wanted <= written <= wanted
    assert result.report.compressed.bytes == written
    assert result.report.reduction == 1 - written / result.report.dense.bytes
    assert result.report.budget == f"target_size: {written:,} of {wanted:,} bytes ({written / wanted - 1:+.2%})"
    assert set(torch.cat([*result.plan.allocation.bits.values()]).tolist()) <= set(settings.get("bits", BITS))
    assert ("head.weight" in result.plan.mask.keep) == ("exclude" not in settings)
    if "choice" in settings:
        assert min(float(keep.float().mean()) for keep in result.plan.mask.keep.values()) >= 0.1


def test_a_larger_file_loses_less_than_a_smaller_one_and_little(model, trained):
    small = copy.deepcopy(trained)

    report = compress(model, TRAINING, target_size=0.31, bits=BITS, steps=1).report
    compress(small, TRAINING, target_size=0.245, bits=BITS, steps=1)

    assert accuracy(trained) > 0.9
    assert accuracy(model) >= accuracy(trained) - 0.05
    assert accuracy(small) <= accuracy(model)
    assert report.sparsity < 0.5


def test_a_size_below_what_must_stay_is_refused_and_leaves_the_model_as_it_was(model):
    before = copies(model)

    with pytest.raises(BudgetError, match=r"target_size cannot be met: 700 bytes are wanted, but with all pruned"):
        compress(model, TRAINING, target_size=700, bits=[2], steps=1, criterion="magnitude")

    assert_equal(copies(model), before)


def test_a_size_that_needs_no_compression_to_speak_of_is_met_as_far_as_the_widths_go_with_a_warning(model):
    with pytest.warns(UserWarning, match=r"target_size: .* nothing is left to fill with bits=\(8,\). Offer wider"):
        result = compress(model, TRAINING, target_size=0.9, bits=[8], steps=1)

    assert result.plan.mask.pruned == 0
    assert result.plan.allocation.average_bits == 8


# --- numbers


def test_given_sparsity_and_bits_are_met_by_the_scores_of_the_dense_model(model, trained, tmp_path):
    result = compress(model, iter(TRAINING), sparsity=0.75, average_bits=3, bits=BITS, steps=1)

    ranked = torch.cat([each.flatten() for _, each in sorted(score(trained, TRAINING).score.items())]).sort().values
    assert result.plan.mask.pruned == round(0.75 * 1224)
    assert result.plan.allocation.average_bits <= 3
    assert result.report.positive_pruned > 0
    assert sum(layer.relevance for layer in result.report.layers) == pytest.approx(1)
    assert saved(model, result, tmp_path) == result.report.compressed.bytes
    kept = {name: score(trained, TRAINING).score[name][keep] for name, keep in result.plan.mask.keep.items()}
    assert float(torch.cat([*kept.values()]).sort().values[50]) > float(ranked[round(0.75 * 1224) - 1])


def test_sparsity_alone_prunes_and_leaves_floats(model, trained, tmp_path):
    result = compress(model, TRAINING, sparsity=0.5)

    assert result.plan.allocation is None
    assert result.report.average_bits is None
    for name, keep in result.plan.mask.keep.items():
        assert torch.equal(model.get_parameter(name), trained.get_parameter(name) * keep)
    assert saved(model, result, tmp_path) == result.report.compressed.bytes


def test_bits_alone_prune_nothing(model):
    result = compress(model, TRAINING, average_bits=4, bits=BITS)

    assert result.plan.mask.pruned == 0
    assert 3.5 <= result.report.average_bits <= 4


def test_protected_layers_are_quantized_only(model):
    result = compress(model, TRAINING, sparsity=0.4, average_bits=4, bits=BITS, choice=Choice(protect=["second"]))

    assert bool(result.plan.mask["second.weight"].all())
    assert "second.weight" in result.plan.allocation.bits
    with pytest.raises(ValueError, match=r"sparsity=0.8 cannot be met: only .* of the 1,224 compressible weights"):
        compress(model, TRAINING, sparsity=0.8, choice=Choice(protect=["second", "hid*"]))


def test_a_criterion_may_be_a_function_that_scores_with_other_settings(model, trained):
    calls = []

    def criterion(model, batches, layers):
        calls.append(layers)
        return score(model, batches, "lrp", composite="epsilon_plus", layers=layers)

    result = compress(model, TRAINING, sparsity=0.5, steps=3, criterion=criterion)

    assert len(calls) == 3  # one a round
    assert result.report.criterion == "criterion"


# --- what it leaves alone


@pytest.mark.parametrize("training", [False, True])
def test_all_but_weights_and_batchnorm_statistics_is_as_it_was_found(model, training):
    model.train(training)
    model.drop.eval()
    model.second.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    handle = model.head.register_forward_hook(lambda *_: None)
    flags = {name: module.training for name, module in model.named_modules()}
    before, identity = copies(model), {name: id(each) for name, each in model.named_parameters()}
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    compress(model, DataLoader(samples(1), 32, shuffle=True), sparsity=0.5, average_bits=4, bits=BITS)

    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: id(each) for name, each in model.named_parameters()} == identity
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["second.weight"]
    assert [*model.head._forward_hooks] == [handle.id]
    assert not any(module._forward_hooks for module in model.modules() if module is not model.head)
    changed = {name for name, each in copies(model).items() if not torch.equal(each, before[name])}
    weights = {f"{layer}.weight" for layer in ("first", "second", "hidden", "head")}
    assert changed == weights | {"norm.running_mean", "norm.running_var"}


def test_batchnorm_statistics_are_those_of_the_compressed_weights(model):
    compress(model, TRAINING, sparsity=0.5)

    with torch.no_grad():
        outputs = [model.first(x) for x, _ in TRAINING]
    mean = torch.stack([each.mean((0, 2, 3)) for each in outputs]).mean(0)
    variance = torch.stack([each.var((0, 2, 3)) for each in outputs]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)


@pytest.mark.slow  # another process has to import torch
def test_lightning_is_not_imported():
    code = (
        "import sys, torch; from lightning_xai_compress import compress; torch.manual_seed(0);"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3));"
        "batches = [(torch.randn(16, 4), torch.randint(3, (16,)))];"
        "print(compress(model, batches, sparsity=0.5).plan.mask.pruned);"
        "assert not {'lightning', 'pytorch_lightning'} & set(sys.modules)"
    )

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["28"]


# --- an accuracy


@pytest.mark.slow
def test_max_drop_ends_at_the_smallest_file_that_was_found_to_keep_it(model, trained, tmp_path):
    metric = MulticlassAccuracy(4, average="micro")

    result = compress(model, TRAINING, max_drop=2, metric=metric, validation=VALIDATION, bits=(3,), steps=1)

    report = result.report
    assert report.dense.accuracy == pytest.approx(accuracy(trained))
    assert report.compressed.accuracy == pytest.approx(accuracy(model))
    within = [point for point in report.path if (report.dense.accuracy - point.metric) * 100 <= 2]
    beyond = [point for point in report.path if point not in within]
    assert report.compressed.bytes == min(point.bytes for point in within)
    assert beyond
    assert max(point.bytes for point in beyond) < report.compressed.bytes < max(point.bytes for point in within)
    assert saved(model, result, tmp_path) == report.compressed.bytes
    assert report.budget.startswith("max_drop: ")


def test_a_drop_that_nothing_keeps_is_warned_of_and_the_best_stays(model, tmp_path):
    class Zeros(Metric):
        """Share of weights that are not zero: what any pruning or coarse grid costs."""

        higher_is_better = True

        def update(self, logits, target):
            pass

        def compute(self):
            return torch.cat([each.flatten() for each in model.parameters()]).ne(0).float().mean()

    with pytest.warns(UserWarning, match=r"max_drop=0.1 is missed by \d+.\d\d points: with nothing pruned"):
        result = compress(model, TRAINING, max_drop=0.1, metric=Zeros(), validation=VALIDATION, bits=(2,), steps=1)

    assert len(result.report.path) == 1
    assert result.plan.mask.pruned == 0
    assert saved(model, result, tmp_path) == result.report.compressed.bytes
    assert "is missed by" in result.report.budget


def test_a_metric_of_units_of_its_own_is_not_multiplied():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)), torch.randn(64, 4)
    batches = [(x, 100 * x.sum(1, keepdim=True))]

    result = compress(
        model,
        batches,
        max_drop=50,
        metric=MeanSquaredError(),
        validation=batches,
        criterion="magnitude",
        bits=(4,),
        steps=1,
    )

    dense = result.report.dense.accuracy
    assert dense > 1000
    within = [point.bytes for point in result.report.path if point.metric - dense <= 50]
    assert result.report.compressed.bytes == min(within)
