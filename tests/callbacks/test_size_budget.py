"""A size that the user names: met from below, whatever training moves, or refused before it."""

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import (
    BudgetError,
    CompressedExport,
    Files,
    Pruning,
    Quantization,
    RelevanceError,
    SizeBudget,
    XAICompression,
    load_compressed,
)
from lightning_xai_compress.callbacks import budget
from lightning_xai_compress.callbacks.scorer import Scorer

from budgets import Stop, WideNet, budgeted
from toy import ToyNet, fit


def file_bytes(folder):
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("share", "settings"),
    [
        *((share, {}) for share in (0.25, 0.1, 0.06)),
        *((share, {"bits": (4,)}) for share in (0.25, 0.06)),
        (0.1, {"criterion": "magnitude"}),
        (0.06, {"selection": "nonpositive"}),
        (0.06, {"files": Files(float16=True)}),
    ],
)
def test_the_file_is_within_two_percent_of_the_target_from_below(tmp_path, share, settings):
    callback = budgeted(tmp_path, target_size=share, **settings)

    model, _ = fit(tmp_path, [callback], model=WideNet)

    target = int(share * callback.report.dense.bytes)
    if share == 0.25 and "bits" in settings:  # four bits for all weights are less
        assert "bytes with nothing pruned, 6,898 were allowed" in callback.report.budget
        assert callback.report.sparsity == 0
        assert file_bytes(tmp_path) < target
        return
    assert 0.98 * target <= file_bytes(tmp_path) <= target
    loaded = load_compressed(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], each) for name, each in model.state_dict().items())


def test_the_sparsity_is_planned_again_when_three_quarters_of_the_steps_are_taken(tmp_path):
    callback = budgeted(tmp_path, target_size=0.06, bits=(4,), pruning=Pruning(steps=8))

    fit(tmp_path, [callback], model=WideNet)

    events = [event for event in callback.report.history if event["event"] in ("planned", "pruned")]
    assert [event["event"] for event in events] == ["planned", *["pruned"] * 5, "planned", *["pruned"] * 3]
    assert events[0]["sparsity"] != events[6]["sparsity"]
    assert events[-1]["sparsity"] == pytest.approx(events[6]["sparsity"], abs=1e-3)


def test_a_number_of_bytes_is_a_target_too(tmp_path):
    callback = budgeted(tmp_path, target_size=2500)

    fit(tmp_path, [callback], model=WideNet)

    assert 2450 <= file_bytes(tmp_path) <= 2500
    assert callback.report.budget.startswith(f"target_size: {file_bytes(tmp_path):,} of 2,500 bytes")


def test_a_config_names_a_share_or_a_number_of_bytes():
    parser = LightningArgumentParser()
    parser.add_class_arguments(XAICompression, "c")

    for given, meant in (("0.02", 0.02), ("20000", 20_000)):
        for config in (
            parser.parse_args([f"--c.target_size={given}"]),
            parser.parse_string(f"c: {{target_size: {given}}}"),
        ):
            stages = parser.instantiate_classes(config).c.stages()
            found = next(stage for stage in stages if isinstance(stage, SizeBudget)).target_size
            assert found == meant
            assert type(found) is type(meant)


@pytest.mark.parametrize(
    "settings", [{"target_size": 0.1}, {"max_drop": 1.0, "metric": MulticlassAccuracy(4), "warmup": 0}]
)
def test_a_trial_of_one_batch_goes_through_every_phase(tmp_path, settings):
    callback = budgeted(tmp_path, **settings)

    fit(tmp_path, [callback], model=WideNet, fast_dev_run=True)

    assert callback.report.average_bits < 8
    assert callback.report.reduction > 0.8
    assert callback.report.budget


@pytest.mark.slow
def test_every_validated_state_stands_in_the_report_with_its_bytes(tmp_path):
    callback = budgeted(tmp_path, target_size=0.1, metric="val_acc")

    fit(tmp_path, [callback], model=WideNet)

    path = callback.report.path
    assert [point.epoch for point in path] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert path[-1].bytes == callback.report.compressed.bytes == file_bytes(tmp_path)
    assert path[-1].metric == callback.report.compressed.accuracy
    assert path[0].average_bits is None
    assert path[0].bytes > path[2].bytes > path[-1].bytes
    assert callback.report == type(callback.report).read(tmp_path / "report.json")


def test_an_estimate_is_printed_before_training(tmp_path, capsys):
    fit(tmp_path, [budgeted(tmp_path, target_size=2500)], model=WideNet)

    table = capsys.readouterr().out.split("bytes, dense")[0]
    assert "2,500 bytes" in table
    last = next(line for line in table.splitlines() if "quantized training" in line)
    estimate = float(last.split("~")[2].split()[0])
    assert estimate == pytest.approx(2.5, rel=0.1)


@pytest.mark.slow
def test_a_resumed_fit_meets_the_size_with_the_weights_of_the_uninterrupted_one(tmp_path):
    whole, _ = fit(tmp_path / "whole", [budgeted(tmp_path / "whole", target_size=0.1)], model=WideNet)

    for epochs in (3, 6):  # within the ramp, and in quantized training
        checkpoint = tmp_path / f"{epochs}.ckpt"
        part = budgeted(tmp_path / "part", target_size=0.1)
        fit(tmp_path / "part", [part, Stop(epochs, checkpoint)], model=WideNet)
        again = budgeted(tmp_path / "again", target_size=0.1)
        resumed, _ = fit(tmp_path / "again", [again], model=WideNet, ckpt_path=checkpoint)

        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
        assert [point.epoch for point in again.report.path] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_file_that_cannot_be_so_small_is_refused_before_training(tmp_path):
    with pytest.raises(BudgetError, match=r"target_size cannot be met: 700 bytes are wanted, but .* still has \d,\d+"):
        fit(tmp_path, [budgeted(tmp_path, target_size=700)], model=WideNet)


def test_protected_layers_larger_than_the_target_are_refused_before_training(tmp_path):
    callback = budgeted(tmp_path, target_size=0.06, pruning=Pruning(protect=("middle",)))

    with pytest.raises(BudgetError, match="exclude or protect less"):
        fit(tmp_path, [callback], model=WideNet)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target_size": 0.1, "max_drop": 0.5}, r"target_size=0.1 and max_drop=0.5 contradict each other"),
        ({"target_size": 1.5}, "share of the dense file between 0 and 1, such as 0.02, or .* bytes, got 1.5"),
        ({"target_size": 0}, "or a whole number of bytes, got 0"),
        ({"target_size": "2 kB"}, "target_size must be a number, got '2 kB'"),
        ({"max_drop": -1}, "max_drop must be positive"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings, text):
    with pytest.raises(ValueError, match=text):
        budgeted("nowhere", **settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target_size": 0.1, "sparsity": 0.5}, "target_size=0.1 chooses the sparsity, but sparsity=0.5 is given, too"),
        ({"target_size": 0.1, "average_bits": 3.0}, "chooses the bits, but average_bits=3.0 is given, too"),
        ({"target_size": 0.1, "selection": "literal"}, "selection='literal' has its own"),
        ({"target_size": 10**6}, "is no smaller than the dense file"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_training(tmp_path, settings, text):
    model = WideNet()

    with pytest.raises(ValueError, match=text):
        fit(tmp_path, [budgeted(tmp_path, **settings)], model=model)

    assert not model.losses


def test_a_budget_alone_says_which_stages_it_needs(tmp_path):
    with pytest.raises(ValueError, match="SizeBudget needs RelevancePruning and MixedPrecision in the same Trainer"):
        fit(tmp_path, [SizeBudget(0.1), CompressedExport(export_dir=str(tmp_path))], model=ToyNet)


@pytest.mark.slow
def test_a_pass_that_fails_while_corrections_are_made_ends_the_compression_and_not_the_fit(tmp_path, monkeypatch):
    passes, training_samples = [], Scorer.training_samples

    def failing(scorer, batch, *, criterion=None, explain=None):
        if criterion == "fisher":
            passes.append(batch)
            if len(passes) > 4:  # before training, for the two plans, and when quantized training begins
                raise RelevanceError("no information")
        return training_samples(scorer, batch, criterion=criterion, explain=explain)

    monkeypatch.setattr(Scorer, "training_samples", failing)
    monkeypatch.setattr(budget, "_SLACK", 0.0)  # every epoch is corrected
    callback = budgeted(tmp_path, target_size=0.1, quantization=Quantization(sensitivity="fisher"))

    with pytest.warns(UserWarning, match="weights could not be scored for their widths: no information"):
        _, trainer = fit(tmp_path, [callback], model=WideNet)

    assert trainer.current_epoch == 8
    assert len(passes) == 5
    assert callback.report.halted == "weights could not be scored for their widths: no information"
    assert file_bytes(tmp_path) <= int(0.1 * callback.report.dense.bytes)
