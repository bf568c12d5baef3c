"""What the Trainer's loggers are given: read back from their real files, beside the report and the plan of the fit."""

import csv
import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_xai_compress import Pruning, RelevanceScoring
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.report import estimated_bytes

from toy import ToyNet, compression, fit, watch_scores

LAYERS = ("first.weight", "head.weight", "second.weight")
WEIGHTS = 776


class Chatty(ToyNet):
    """Logs a metric of its own at every step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        self.log("batch", float(self.trainer.current_epoch * 4 + batch_idx), on_epoch=False)
        return loss


def events(logger):
    read = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "histograms": 0})
    read.Reload()
    return read


def scalars(logger, name):
    """Step -> value; a step that is there twice fails."""
    found = events(logger).Scalars(name)
    assert len({each.step for each in found}) == len(found)
    return {each.step: each.value for each in found}


def rows(logger):
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def column(logger, name):
    """Step -> value, of the rows that have one."""
    found = [row for row in rows(logger) if row[name] != ""]
    assert len({row["step"] for row in found}) == len(found)
    return {int(row["step"]): float(row[name]) for row in found}


def test_tensorboard_and_csv_hold_the_figures_of_the_history_at_its_steps(tmp_path):
    board, table = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")
    callback = compression(tmp_path)
    fit(tmp_path, [callback], Chatty, logger=[board, table], log_every_n_steps=1)
    history, report = callback.report.history, callback.report

    # four batches an epoch, and one step each
    pruned = {round(4 * each["epoch"]): each["sparsity"] for each in history if each["event"] == "pruned"}
    start = next(round(4 * each["epoch"]) for each in history if each["event"] == "quantized")
    assert len(pruned) == 6
    for read in (lambda name: scalars(board, name), lambda name: column(table, name)):
        sparsity = read("compression/sparsity")
        assert sparsity.keys() == pruned.keys() | {start}
        assert {step: sparsity[step] for step in pruned} == pytest.approx(pruned)
        assert sparsity[start] == pytest.approx(0.5)
        assert read("compression/average_bits") == {start: pytest.approx(report.average_bits)}
        size = read("compression/estimated_bytes")
        assert size[start] == estimated_bytes(report.dense.bytes, WEIGHTS, 0.5, report.average_bits)
        first = min(pruned)
        assert size[first] == estimated_bytes(report.dense.bytes, WEIGHTS, pruned[first], None)
        for layer in report.layers:
            assert read(f"compression/sparsity/{layer.name}")[start] == pytest.approx(layer.sparsity)
            mean = sum(width * count for width, count in layer.bits.items()) / sum(layer.bits.values())
            assert read(f"compression/average_bits/{layer.name}") == {start: pytest.approx(mean)}
            shares = read(f"compression/relevance_share/{layer.name}")
            assert shares.keys() == pruned.keys() | {start}  # each scored for itself
            assert shares[start] == pytest.approx(layer.relevance)


def test_the_steps_are_those_that_self_log_writes_for_the_same_batch(tmp_path):
    """Under accumulation, two batches are one step: for the module's own metrics and for ours."""
    board = TensorBoardLogger(tmp_path / "board")
    callback = compression(tmp_path)
    fit(tmp_path, [callback], Chatty, logger=board, log_every_n_steps=1, accumulate_grad_batches=2)

    batch_of = scalars(board, "batch")  # logged with the last batch of each step
    at = {round(4 * each["epoch"]) for each in callback.report.history}
    expected = {step for step, batch in batch_of.items() if at & {int(batch) - 1, int(batch)}}
    assert scalars(board, "compression/sparsity").keys() == expected


def test_scores_of_a_batch_within_an_accumulation_are_logged_with_its_last_batch(tmp_path, monkeypatch):
    """They are let go of before that."""
    scores, batches = watch_scores(monkeypatch), []
    board = TensorBoardLogger(tmp_path / "board")
    callback = compression(tmp_path, warmup="5 steps", pruning=Pruning(steps=2))
    rescore = Session.rescore
    monkeypatch.setattr(Session, "rescore", lambda session, batch: (batches.append(batch), rescore(session, batch))[1])
    fit(tmp_path, [callback], Chatty, logger=board, log_every_n_steps=1, accumulate_grad_batches=2)

    read = events(board)
    steps = sorted({batch // 2 for batch in batches})
    assert len(steps) == len(scores) >= 3
    assert any(batch % 2 == 0 for batch in batches)
    for name in LAYERS:
        totals = [sum(float(each.abs().sum()) for each in found.relevance.values()) for found in scores]
        wanted = [float(s.relevance[name].abs().sum()) / total for s, total in zip(scores, totals, strict=True)]
        shares = scalars(board, f"compression/relevance_share/{name}")
        assert sorted(shares) == steps
        assert [shares[step] for step in steps] == pytest.approx(wanted)
        drawn = read.Histograms(f"compression/relevance/{name}")
        assert [each.step for each in drawn] == steps
        for each, found in zip(drawn, scores, strict=True):
            relevance = found.relevance[name].double()
            assert each.histogram_value.num == relevance.numel()
            assert each.histogram_value.sum == pytest.approx(float(relevance.sum()), rel=1e-5, abs=1e-9)


def test_the_users_own_columns_survive_in_the_csv(tmp_path):
    plain, ours = CSVLogger(tmp_path / "plain"), CSVLogger(tmp_path / "ours")
    fit(tmp_path, [], Chatty, logger=plain, log_every_n_steps=1)
    fit(tmp_path, [compression(tmp_path)], Chatty, logger=ours, log_every_n_steps=1)

    assert column(ours, "batch") == column(plain, "batch") == {step: float(step) for step in range(32)}
    assert column(ours, "val_acc").keys() == column(plain, "val_acc").keys()
    assert {k: v for k, v in column(ours, "train_loss").items() if k < 8} == {
        k: v for k, v in column(plain, "train_loss").items() if k < 8
    }
    assert all(None not in row and None not in row.values() for row in rows(ours))
    assert all(row["epoch"] == str(int(row["step"]) // 4) for row in rows(ours) if row["compression/sparsity"])


def test_histograms_hold_relevance_and_bits_of_every_layer(tmp_path, monkeypatch):
    scores = watch_scores(monkeypatch)
    board = TensorBoardLogger(tmp_path / "board")
    callback = compression(tmp_path)
    fit(tmp_path, [callback], logger=board)
    read, session = events(board), callback.session
    start = session.stages[2].position

    for name in LAYERS:
        drawn = read.Histograms(f"compression/bits/{name}")
        assert [each.step for each in drawn] == [start]
        bits = session.latent.bits[name].double()
        value = drawn[0].histogram_value
        assert (value.num, value.sum, value.min, value.max) == (len(bits), bits.sum(), bits.min(), bits.max())

        drawn = read.Histograms(f"compression/relevance/{name}")
        assert [each.step for each in drawn] == sorted(scalars(board, f"compression/relevance_share/{name}"))
        relevance = scores[-1].relevance[name].double()
        value = drawn[-1].histogram_value
        assert value.num == relevance.numel()
        assert value.sum == pytest.approx(float(relevance.sum()), rel=1e-5, abs=1e-9)
        assert (value.min, value.max) == (float(relevance.min()), float(relevance.max()))


def test_a_scoring_pass_alone_logs_relevance_and_no_sparsity_twice(tmp_path):
    board = TensorBoardLogger(tmp_path / "board")
    fit(tmp_path, [RelevanceScoring(relevance_epochs=[1, 3])], logger=board)

    names = events(board).Tags()["scalars"]
    assert set(scalars(board, "compression/relevance_share/head.weight")) == {4, 12}
    assert set(scalars(board, "compression/sparsity")) == {4}  # zero, and it stays so
    assert "compression/average_bits" not in names
    total = [sum(scalars(board, f"compression/relevance_share/{name}")[step] for name in LAYERS) for step in (4, 12)]
    assert total == pytest.approx([1.0, 1.0])


class Broken:
    def add_histogram(self, *arguments):
        raise ConnectionError("no network")


class Bare(Logger):
    """Keeps what it is given, and fails at histograms."""

    def __init__(self):
        super().__init__()
        self.seen = []

    name, version = "bare", 0

    experiment = Broken()

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.seen.append((step, dict(metrics)))


def test_a_logger_that_cannot_draw_gets_the_scalars_and_costs_no_training(tmp_path):
    bare, board = Bare(), TensorBoardLogger(tmp_path / "board")
    with pytest.warns(UserWarning, match="Bare gets no histograms: ConnectionError: no network") as caught:
        model, _ = fit(tmp_path, [compression(tmp_path)], logger=[bare, board])
    plain, _ = fit(tmp_path / "plain", [compression(tmp_path / "plain")])

    got = {step: metrics["compression/sparsity"] for step, metrics in bare.seen if "compression/sparsity" in metrics}
    assert got == pytest.approx(scalars(board, "compression/sparsity"))
    assert all(
        isinstance(value, float | int) and math.isfinite(value) for _, each in bare.seen for value in each.values()
    )
    assert sum("no network" in str(each.message) for each in caught) == 1
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_fast_dev_run_and_a_fit_without_a_logger_write_no_logs(tmp_path):
    class Seen(L.Callback):
        def on_train_end(self, trainer, pl_module):
            self.metrics = dict(trainer.logged_metrics)

    seen = Seen()
    fit(tmp_path, [compression(tmp_path), seen], logger=False)
    assert not any(name.startswith("compression/") for name in seen.metrics)

    board = TensorBoardLogger(tmp_path / "board")
    fit(tmp_path, [compression(tmp_path)], logger=board, fast_dev_run=True)
    assert not (tmp_path / "board").exists()
    assert not list(tmp_path.rglob("*tfevents*"))


def test_only_global_rank_zero_logs(tmp_path, monkeypatch):
    bare = Bare()
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    fit(tmp_path, [compression(tmp_path)], logger=bare)

    assert not any(name.startswith("compression/") for _, metrics in bare.seen for name in metrics)


@pytest.mark.parametrize("epochs", [3, 5], ids=["while pruning", "quantized"])
def test_a_resumed_fit_logs_each_step_once_and_with_the_values_of_the_uninterrupted_run(tmp_path, epochs):
    def run(folder, **settings):
        bare = Bare()
        saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        fit(folder, [compression(folder), saver], logger=bare, enable_checkpointing=True, **settings)
        ours = [(step, {k: v for k, v in each.items() if "/" in k}) for step, each in bare.seen]
        return [(step, each) for step, each in ours if each]

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", ckpt_path=str(tmp_path / "whole" / f"epoch={epochs - 1}.ckpt"))

    steps = [step for step, _ in resumed]
    assert len(set(steps)) == len(steps)
    assert resumed == [(step, metrics) for step, metrics in whole if step >= 4 * epochs]
    assert bool(resumed) == (epochs == 3)


def test_values_that_are_not_finite_and_huge_layers_are_drawn_from_a_sample():
    from lightning_xai_compress.callbacks.logs import _sample

    values = torch.arange(200_000.0)
    values[::2] = torch.nan
    drawn = _sample(values.view(2, -1))

    assert 30_000 < len(drawn) < 35_000  # half of 65,536
    assert torch.isfinite(drawn).all()
    assert float(drawn.mean()) == pytest.approx(100_000, rel=0.02)
    assert _sample(torch.full((3,), torch.nan)).numel() == 0
    assert np.array_equal(_sample(torch.tensor([1, 2, 3], dtype=torch.uint8)).numpy(), [1.0, 2.0, 3.0])
