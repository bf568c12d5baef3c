"""The Fashion-MNIST benchmark: which of its results hold, what is done next, and its fits."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from time import sleep
from types import SimpleNamespace

import pytest
import torch

from lightning_xai_compress import load_compressed

from fashion_rows import BENCHMARKS, DENSE_BYTES, ISSUE_CHECKS, modules, run_of


@pytest.fixture
def bench(monkeypatch):
    return modules(monkeypatch)


# --- what holds, and what is done next


def base_result(bench, base, weights, *, start="", test=93.0, recipe=None):
    recipe = bench.grid.fingerprint(recipe or bench.grid.FULL, base)
    return bench.tasks.BaseResult(test - 0.1, test, 60.0, recipe, start, weights)


def run_result(bench, run, start, *, recipe=None):
    recipe = bench.grid.fingerprint(recipe or bench.grid.FULL, run)
    return bench.tasks.RunResult(92.4, 92.5, 34_000, DENSE_BYTES, 34_048, 0.91, 2.9, 80.0, 27, recipe, start)


class Worker:
    """Does tasks in threads, without training; a dense model's weights are what `weights` says."""

    def __init__(self, bench, pool, failing=()):
        self.bench, self.pool, self.failing = bench, pool, failing
        self.weights, self.log, self.at_once, self.most, self.lock = "w0", [], 0, 0, Lock()

    def submit(self, task) -> Future:
        self.log.append(task.key)
        return self.pool.submit(self.do, task)

    def do(self, task):
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        sleep(0.002)
        with self.lock:
            self.at_once -= 1
        if task.key in self.failing:
            raise RuntimeError("no luck")
        if isinstance(task, self.bench.tasks.Run):
            return run_result(self.bench, task, self.weights)
        dense = task.kind == "dense"
        return base_result(self.bench, task, self.weights if dense else "c", start="" if dense else self.weights)


@pytest.fixture
def setup(bench, tmp_path):
    """Two seeds of two runs, a worker, and a function that works through them as one call of the script does."""
    every = [run_of(bench, name, seed=seed) for seed in (0, 1) for name in ("default", "lamp")]
    path = tmp_path / "results.json"
    with ThreadPoolExecutor(4) as pool:

        def call(worker, *, chosen=every, recipe=bench.grid.FULL, jobs=2, kept=lambda _: "w0", again=False):
            book = bench.book.Book(path, recipe, every)
            failed = bench.bench.work(chosen, book, worker.submit, jobs=jobs, kept=kept, again=again)
            return book, [task.key for task in failed]

        yield SimpleNamespace(
            every=every, path=path, call=call, worker=lambda failing=(): Worker(bench, pool, failing), bench=bench
        )


def bases(seed):
    return [f"cnn/{kind}/seed{seed}" for kind in ("dense", "control")]


def test_bases_come_before_their_runs_and_no_more_run_at_once_than_asked_for(setup):
    worker = setup.worker()

    book, failed = setup.call(worker)

    assert not failed
    assert sorted(worker.log) == sorted([*bases(0), *bases(1), *(run.key for run in setup.every)])
    for run in setup.every:
        dense, control = bases(run.seed)
        assert worker.log.index(dense) < worker.log.index(control) < worker.log.index(run.key)
    assert worker.most == 2
    assert [row.run for row in book.rows()] == setup.every

    alone = setup.worker()
    setup.call(alone, jobs=1, again=True)
    assert alone.most == 1
    assert alone.log == [run.key for run in setup.every]


def test_an_interrupted_benchmark_goes_on_where_it_was(setup):
    setup.call(setup.worker(), chosen=setup.every[:1])
    worker = setup.worker()

    setup.call(worker)

    assert sorted(worker.log) == sorted([*bases(1), *(run.key for run in setup.every[1:])])
    idle = setup.worker()
    setup.call(idle)
    assert idle.log == []


def test_a_row_on_disk_has_all_figures_and_its_control(setup):
    setup.call(setup.worker(), chosen=setup.every[:1])

    content = json.loads(setup.path.read_text())
    row = content["runs"]["cnn/default-mixed/97.5/seed0"]
    assert row.pop("code")
    assert row == {
        "model": "cnn", "method": "default", "widths": "mixed", "budget": "size", "value": 97.5, "seed": 0,
        "val": 92.4, "test": 92.5, "control_test": 93.0, "bytes": 34_000, "dense_bytes": DENSE_BYTES,
        "reduction": 1 - 34_000 / DENSE_BYTES, "target": 34_048, "sparsity": 0.91, "average_bits": 2.9,
        "seconds": 80.0, "history": 27, "start": "w0",
        "recipe": setup.bench.grid.fingerprint(setup.bench.grid.FULL, setup.every[0]),
    }  # fmt: skip
    assert content["checks"]["drop_at_97_5"] == 0.5
    assert content["seeds_of_checks"]["drop_at_97_5"] == 1


def test_results_of_another_recipe_are_done_again_and_not_reported(setup):
    setup.call(setup.worker(), chosen=setup.every[:1])
    other = replace(setup.bench.grid.FULL, pruning_end=0.5)

    book = setup.bench.book.Book(setup.path, other, setup.every)

    assert book.rows() == []
    assert book.controls()["cnn"] == {0: 93.0}  # the control knows no pruning
    assert any(line.startswith("not run yet, or with other settings: 4 of cnn") for line in book.remarks())
    worker = setup.worker()
    setup.call(worker, chosen=setup.every[:1], recipe=other)
    assert worker.log == ["cnn/default-mixed/97.5/seed0"]


def test_a_dense_checkpoint_that_is_gone_takes_its_results_with_it(setup):
    setup.call(setup.worker())
    worker = setup.worker()
    worker.weights = "w1"

    book, _ = setup.call(worker, chosen=setup.every[:1], kept=lambda _: None, again=True)

    assert worker.log == [*bases(0), "cnn/default-mixed/97.5/seed0"]
    # the other run of that seed started from weights that are no more
    assert [row.run for row in book.rows()] == [setup.every[0], *setup.every[2:]]
    idle = setup.worker()
    setup.call(idle, chosen=setup.every[2:], kept=lambda _: None)
    assert idle.log == []  # nothing needs the checkpoints


def test_a_failure_is_told_and_stops_only_what_needs_it(setup, capsys):
    book, failed = setup.call(setup.worker({"cnn/dense/seed0", "cnn/lamp-mixed/97.5/seed1"}))

    assert failed[0] == "cnn/dense/seed0"
    assert {*failed} == {*bases(0), *(run.key for run in setup.every[:2]), "cnn/lamp-mixed/97.5/seed1"}
    assert [row.run for row in book.rows()] == [setup.every[2]]
    assert "cnn/dense/seed0: RuntimeError: no luck" in capsys.readouterr().out
    assert "failed: cnn/lamp-mixed/97.5/seed1: RuntimeError: no luck" in book.remarks()

    book, failed = setup.call(setup.worker())

    assert not failed
    assert not [line for line in book.remarks() if "fail" in line]


# --- fits


@pytest.fixture
def small(bench, monkeypatch, tmp_path):
    """Noise in place of the images, and the shortest recipe."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(count, 1, 28, 28, generator=generator), torch.randint(10, (count,), generator=generator))
        for count in (256, 64, 96)
    ]
    monkeypatch.setattr(bench.fit, "_images", lambda: parts)
    recipe = replace(bench.grid.QUICK, train_samples=192, batch_size=32, scoring_samples=32)
    return SimpleNamespace(recipe=recipe, cache=tmp_path / "cache", test=parts[2], **vars(bench))


def test_a_run_starts_from_the_dense_checkpoint_and_its_file_is_what_is_measured(small):
    dense, control = (small.tasks.Base("lenet", 0, kind) for kind in ("dense", "control"))
    start = small.fit.fit_base(dense, small.recipe, small.cache)
    after = small.fit.fit_base(control, small.recipe, small.cache)
    run = run_of(small, "nonpositive", 0.5, model="lenet", kind="sparsity")

    result = small.fit.fit_run(run, small.recipe, small.cache)

    assert start.start == ""
    assert start.weights == after.start == result.start == small.fit.kept_weights(dense, small.recipe, small.cache)
    assert after.weights != start.weights
    file = small.cache / run.key / "model.safetensors"
    report = json.loads(file.with_name("report.json").read_text())
    assert result.bytes == file.stat().st_size
    assert result.dense_bytes == report["dense"]["bytes"]
    assert result.target is None
    assert result.sparsity == report["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert result.average_bits == report["average_bits"]
    assert result.history == len(report["history"])
    assert "estimated size" in (file.parent / "log.txt").read_text()
    network = load_compressed(file, small.fit.NETWORKS["lenet"]()).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        right = network(small.test[0]).argmax(1) == small.test[1]
    assert result.test == pytest.approx(100 * right.float().mean().item())


def test_a_kept_base_is_not_trained_again_unless_the_recipe_changes(small, monkeypatch):
    dense = small.tasks.Base("lenet", 0, "dense")
    first = small.fit.fit_base(dense, small.recipe, small.cache)
    monkeypatch.setattr(small.fit, "train", lambda *_, **__: pytest.fail("it trains"))

    assert small.fit.fit_base(dense, small.recipe, small.cache) == first
    assert small.fit.fit_base(dense, replace(small.recipe, pruning_end=0.5), small.cache) == first
    with pytest.raises(pytest.fail.Exception, match="it trains"):
        small.fit.fit_base(dense, replace(small.recipe, learning_rate=0.05), small.cache)
    with pytest.raises(RuntimeError, match="of another recipe: expected a run of lenet/dense/seed0 first"):
        small.fit.fit_run(run_of(small, model="lenet"), replace(small.recipe, dense_epochs=2), small.cache)


@pytest.mark.slow
def test_a_quick_benchmark_runs_every_budget_and_is_not_run_twice(tmp_path):
    output = tmp_path / "fashion.json"

    def call():
        result = subprocess.run(
            [sys.executable, BENCHMARKS / "fashion_bench.py", "--quick", "--output", output, "--only", "lenet/[dl]*"],
            cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    out = call()
    content = json.loads(output.read_text())
    assert not content["failed"]
    budgets = Counter(row["budget"] for row in content["runs"].values())
    assert budgets == {"size": 1, "natural": 1, "max_drop": 1}
    assert content["checks"].keys() == {"target_size_error"}  # the others are of the CNN
    assert content["checks"]["target_size_error"] <= content["limits"]["target_size_error"] == 0.02
    assert content["environments"][0]["threads"] == 1
    page = (tmp_path / "artifacts/benchmark_quick/docs/benchmark.md").read_text()
    assert "## LeNet-300-100" in page
    assert "not run yet, or with other settings: 1 of resnet (resnet/default-mixed/97.5/seed0)" in page
    assert all(name in out for name in ISSUE_CHECKS)
    before = output.read_bytes()
    assert "test" not in call().split("| check |")[0]
    assert output.read_bytes() == before
