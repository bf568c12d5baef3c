"""A loss of accuracy that the user names: compressed as far as it allows, and back where it went too far."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import load_compressed

from budgets import Stop, WideNet, budgeted
from toy import fit


class GradedNet(WideNet):
    """Logs a metric that falls as the network gets sparser, by a rule that a test can foresee."""

    def __init__(self, allowed=0.9):
        super().__init__()
        self.allowed = allowed

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        zeros = sum(int((each == 0).sum()) for name, each in self.named_parameters() if name.endswith("weight"))
        self.log("quality", 1.0 if zeros / 6656 <= self.allowed else 0.5)


def graded(folder, **settings):
    return budgeted(folder, **({"max_drop": 5.0, "metric": "quality", "mode": "max", "warmup": 1} | settings))


def test_the_fit_ends_at_the_smallest_state_that_kept_the_budget(tmp_path):
    callback = graded(tmp_path)

    model, _ = fit(tmp_path, [callback], model=GradedNet, max_epochs=16)

    report = callback.report
    kept = [point for point in report.path if point.metric == 1.0 and point.average_bits is not None]
    lost = [point for point in report.path if point.metric == 0.5]
    assert kept
    assert lost
    smallest = min(kept, key=lambda point: point.bytes)
    assert [point.sparsity for point in report.path[-4:]] == [smallest.sparsity] * 4  # a quarter of the fit
    assert report.compressed.bytes == report.path[-1].bytes
    assert any(point.epoch < 13 and point.sparsity == smallest.sparsity for point in kept)
    assert report.compressed.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert report.compressed.accuracy == 1.0
    assert report.budget.startswith("max_drop: +0.00 of 5 points lost")
    assert any(event["event"] == "rolled back" for event in report.history)
    loaded = load_compressed(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], each) for name, each in model.state_dict().items())
    zeros = sum(int((each == 0).sum()) for name, each in loaded.items() if name.endswith("weight"))
    assert zeros / 6656 <= 0.9
    # those of states that were given up do not count
    assert 0 < report.positive_pruned < round(6656 * report.sparsity)


def test_the_smallest_state_trains_to_the_end_and_its_latest_validation_counts(tmp_path):
    class Healing(GradedNet):
        """Beyond a sparsity it fails; in the last epochs what is left of a drop heals, but for the very last."""

        def log(self, name, value, *args, **kwargs):
            if name == "quality" and value == 1.0 and self.current_epoch > 1:
                value = 0.99 if self.current_epoch in (13, 14) else 0.96
            super().log(name, value, *args, **kwargs)

    callback = graded(tmp_path)

    fit(tmp_path, [callback], model=Healing, max_epochs=16)

    assert [point.metric for point in callback.report.path[-4:]] == pytest.approx([0.96, 0.99, 0.99, 0.96])
    assert callback.report.compressed.accuracy == pytest.approx(0.96)
    assert callback.report.exported_epoch is None
    assert callback.report.budget.startswith("max_drop: +4.00 of 5 points lost")


@pytest.mark.slow
def test_where_the_last_validation_fails_the_one_before_counts(tmp_path):
    class Falling(GradedNet):
        def log(self, name, value, *args, **kwargs):
            if name == "quality" and self.current_epoch == 15:
                value = 0.1
            super().log(name, value, *args, **kwargs)

    callback = graded(tmp_path)

    model, _ = fit(tmp_path, [callback], model=Falling, max_epochs=16)

    report = callback.report
    assert report.path[-1].metric == pytest.approx(0.1)
    assert report.compressed.accuracy == 1.0
    assert report.history[-1]["event"] == "rolled back"
    assert report.compressed.bytes == report.path[-2].bytes
    loaded = load_compressed(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], each) for name, each in model.state_dict().items())


@pytest.mark.slow
def test_steps_get_finer_where_they_went_too_far(tmp_path):
    callback = graded(tmp_path)

    fit(tmp_path, [callback], model=GradedNet, max_epochs=16)

    asked = [event["bytes"] for event in callback.report.history if event["event"] == "compressed"]
    back = [event["bytes"] for event in callback.report.history if event["event"] == "rolled back"]
    first = asked[1] / asked[0]
    assert first == pytest.approx(0.7, abs=0.02)
    after = min(size for size in asked if size < back[-1]) if min(asked) < back[-1] else asked[-1]
    assert after / back[-1] > first


def test_a_budget_that_nothing_keeps_says_by_how_much_and_keeps_the_best(tmp_path):
    callback = graded(tmp_path)

    with pytest.warns(UserWarning, match=r"max_drop=5 is missed by 45.00 points: the best .* state lost 50.00 at"):
        fit(tmp_path, [callback], model=GradedNet(allowed=0.01))

    assert callback.report.compressed.accuracy == 0.5
    assert "max_drop=5 is missed by 45.00 points" in callback.report.budget
    assert callback.report.compressed.bytes < callback.report.dense.bytes


@pytest.mark.slow
def test_an_error_is_a_metric_that_should_fall(tmp_path):
    class Error(GradedNet):
        def log(self, name, value, *args, **kwargs):
            super().log(name, 1 - value if name == "quality" else value, *args, **kwargs)

    callback = graded(tmp_path, mode="min")

    fit(tmp_path, [callback], model=Error, max_epochs=16)

    assert callback.report.compressed.accuracy == 0.0
    assert callback.report.budget.startswith("max_drop: +0.00 of 5 points lost")


@pytest.mark.slow
def test_a_torchmetrics_metric_is_measured_from_the_first_batch_on(tmp_path):
    callback = budgeted(tmp_path, max_drop=2.0, metric=MulticlassAccuracy(4, average="micro"), warmup=3)

    fit(tmp_path, [callback], model=WideNet, max_epochs=12)

    report = callback.report
    assert report.dense.at_epoch == 3
    assert report.compressed.accuracy >= report.dense.accuracy - 0.02
    assert report.reduction > 0.85


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    callback = graded(tmp_path_factory.mktemp("whole"))
    model, _ = fit(callback._export.export_dir, [callback], model=GradedNet, max_epochs=14)
    return callback, model


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [2, 7, 11])
def test_a_resumed_fit_goes_through_the_same_rounds(tmp_path, uninterrupted, epochs):
    whole, model = uninterrupted
    checkpoint = tmp_path / "part.ckpt"
    fit(tmp_path / "part", [graded(tmp_path / "part"), Stop(epochs, checkpoint)], model=GradedNet, max_epochs=14)

    again = graded(tmp_path / "again")
    resumed, _ = fit(tmp_path / "again", [again], model=GradedNet, max_epochs=14, ckpt_path=checkpoint)

    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert again.report.path == whole.report.path
    assert again.report.positive_pruned == whole.report.positive_pruned > 0
    assert again.report.history == whole.report.history


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"metric": None, "mode": None}, "max_drop=5.0 needs metric=: what may drop"),
        ({"mode": None}, "needs mode='max' or 'min': quality does not tell which is better"),
        ({"sparsity": 0.5}, "chooses the sparsity, but sparsity=0.5 is given, too"),
        ({"average_bits": 3.0}, "chooses the bits, but average_bits=3.0 is given, too"),
    ],
)
def test_what_it_cannot_go_by_is_refused_before_training(tmp_path, settings, text):
    model = GradedNet()

    with pytest.raises(ValueError, match=text):
        fit(tmp_path, [graded(tmp_path, **settings)], model=model)

    assert not model.losses


def test_a_fit_without_validation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="judged at validations, but this fit has none"):
        fit(tmp_path, [graded(tmp_path)], model=GradedNet, limit_val_batches=0)


def test_averages_of_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot go back under a callback that averages weights"):
        fit(tmp_path, [graded(tmp_path), WeightAveraging()], model=GradedNet)


def test_a_metric_that_the_trial_validation_does_not_log_is_refused_before_training(tmp_path):
    model = GradedNet()

    with pytest.raises(ValueError, match=r"metric='qality', which the trial .* did not log; logged were \[.*'quality'"):
        fit(tmp_path, [graded(tmp_path, metric="qality")], model=model, num_sanity_val_steps=1)

    assert not model.losses


def test_without_a_trial_a_metric_that_never_appears_is_said_after_the_first_validation_and_at_the_end(tmp_path):
    with pytest.warns(UserWarning, match="was not judged: no validation measured the metric") as said:
        fit(tmp_path, [graded(tmp_path, metric="qality")], model=GradedNet, num_sanity_val_steps=0)

    waits = [str(each.message) for each in said if "waits for metric='qality'" in str(each.message)]
    assert len(waits) == 1
    assert "which the validation of epoch 1.00 did not log" in waits[0]


def test_the_metric_that_the_trial_logs_is_taken(tmp_path):
    callback = graded(tmp_path)

    fit(tmp_path, [callback], model=GradedNet, num_sanity_val_steps=1)

    assert callback.report.path


def test_points_are_units_of_a_metric_beyond_one():
    from lightning_xai_compress import AccuracyBudget

    budget = AccuracyBudget(0.5)
    budget.export = type("Export", (), {"mode": "max"})
    budget._reference = 92.5
    assert budget.lost(92.0) == 0.5
    budget._reference = 0.925
    assert math.isclose(budget.lost(0.92), 0.5)
