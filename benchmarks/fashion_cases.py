"""What the benchmarks of further parts share: fits from the same dense checkpoints, done once each, and their means."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning_xai_compress.formats.onnx import OnnxModule
from lightning_xai_compress.tables import table

import fashion_fit
from common import RESULTS, Results, environment
from fashion_fit import checkpoint, fit_base, network, prepare
from fashion_grid import FULL, QUICK, Recipe
from fashion_tasks import CONTROL, DENSE, Base

__all__ = ["MODELS", "NOISE", "Case", "Study", "evaluate", "gain", "lead", "mean_of", "summary"]

NOISE = 0.3  # points that a difference has to exceed
MODELS = ("cnn", "resnet", "pitch")
_SHORT = {"cnn": 1, "resnet": 1, "pitch": 3}  # epochs
PITCH = Recipe(  # rate by validation without compression: 99.5 % within 50 cents, 99.0 % with 0.001
    scoring_samples=256,
    batch_size=64,
    learning_rate=0.003,
    train_samples=4_096,
    val_samples=4_096,
    test_samples=4_096,
    distillation=None,
)


@dataclass(frozen=True)
class Case:
    """One fit."""

    model: str
    kind: str
    seed: int

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.model}/{self.kind}/seed{self.seed}"

    @classmethod
    def read(cls, key: str) -> Case:
        """The case of a key."""
        model, kind, seed = key.split("/")
        return cls(model, kind, int(seed.removeprefix("seed")))

    def folder(self, cache: Path, name: str) -> Path:
        """Where its files are."""
        return cache / name / self.key.replace(":", "-")


class Study:
    """The options of a script, its results, and the work that is not done yet.

    Args:
        name: Of the results and of the folder of files.
        doc: Of the script.
        limits: Of its figures.
        taught: Whether the dense model teaches.
        long: Kinds that train on for the 6 epochs of `fashion_bench.py`, and not for 1 (3 of the few tones).
    """

    def __init__(
        self, name: str, doc: str | None, limits: Mapping[str, float], *, taught: bool, long: Sequence[str] = ()
    ) -> None:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--only", default="*", help="shell pattern on keys such as cnn/lrp/seed0")
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--jobs", type=int, default=1, help="processes side by side, of one thread each")
        parser.add_argument("--quick", action="store_true", help="few images and one epoch, only to see that it runs")
        parser.add_argument("--report", action="store_true", help="run nothing: figures from the results")
        parser.add_argument("--rounds", type=int, default=31, help="of timing, where there is any")
        parser.add_argument("--output", type=Path)
        parser.add_argument("--cache", type=Path)
        self.options = parser.parse_args()
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
        prepare()
        quick = "_quick" if self.options.quick else ""
        self.name = name
        self.long = long
        self.recipe = QUICK if quick else FULL
        if not taught:
            self.recipe = replace(self.recipe, distillation=None)
        self.cache = (self.options.cache or Path(f"artifacts/benchmark{quick}")).resolve()
        output = self.options.output or RESULTS / f"{name}{quick}.json"
        found = json.loads(output.read_text()) if output.exists() else {}
        known = {"runs": {}, "latency": {}, **found, "environment": environment(self.options.seeds), "limits": limits}
        self.results = Results(output, **known)

    @property
    def runs(self) -> dict[str, Any]:
        """What is done, by key."""
        found: dict[str, Any] = self.results.content["runs"]
        return found

    def cases(self, kinds: Sequence[str], quick: Sequence[str]) -> list[Case]:
        """All that the options ask for."""
        if self.options.quick:
            return [Case(MODELS[0], kind, 0) for kind in quick]
        return [Case(model, kind, seed) for seed in self.options.seeds for model in MODELS for kind in kinds]

    def recipe_of(self, case: Case) -> Recipe:
        """The same for all that are compared."""
        epochs = self.recipe.epochs if case.kind in self.long else min(_SHORT[case.model], self.recipe.epochs)
        if case.model != "pitch":
            return replace(self.recipe, epochs=epochs)
        return replace(PITCH, epochs=epochs, train_samples=min(PITCH.train_samples, self.recipe.train_samples))

    def work(self, cases: Iterable[Case], run: Callable[[Case, Recipe, Path], dict[str, float]]) -> None:
        """Do what is not done, so many at once."""
        chosen = [case for case in cases if fnmatchcase(case.key, self.options.only) and case.key not in self.runs]
        if self.options.report:
            return
        with ProcessPoolExecutor(self.options.jobs, multiprocessing.get_context("spawn"), prepare) as pool:
            for kind in (DENSE, CONTROL):
                needed = [(Base(case.model, case.seed, kind), self.recipe_of(case)) for case in chosen]
                bases = {checkpoint(self.cache, *base): base for base in needed}
                for each in [pool.submit(fit_base, *base, self.cache) for base in bases.values()]:
                    each.result()
            waiting = {pool.submit(run, case, self.recipe_of(case), self.cache): case for case in chosen}
            for future in as_completed(waiting):
                key = waiting[future].key
                self.results.add("runs", key, **future.result())
                print(key, self.runs[key], flush=True)

    def tell(self, checks: Mapping[str, float], default: str) -> None:
        """Write the figures, and print them and what the default is ahead of the others."""
        self.results.content.pop("checks", None)
        self.results.add("checks", **checks)
        print(f"{summary(self.runs)}\n\n{lead(self.runs, default)}\n")
        for key, times in self.results.content["latency"].items():
            print(f"{key}: {', '.join(f'{name} {value:.2f}' for name, value in times.items())} of dense")
        print(json.dumps(checks, indent=1))


def evaluate(model: Any, case: Case, recipe: Recipe) -> tuple[float, float]:
    """Accuracy in percent on validation and test data, of an ONNX file within its module."""
    judge = model
    if isinstance(model, OnnxModule):
        judge = network(case.model, case.seed)
        judge.net = model
    return fashion_fit.evaluate(judge, recipe)


def mean_of(runs: Mapping[str, Mapping[str, float]], model: str, kind: str, name: str) -> float | None:
    """Of a figure over seeds; None without any."""
    found = [row[name] for key, row in runs.items() if (Case.read(key).model, Case.read(key).kind) == (model, kind)]
    return statistics.mean(found) if found else None


def gain(runs: Mapping[str, Mapping[str, float]], model: str, ours: str, theirs: str) -> tuple[float, bool] | None:
    """Mean of the paired differences in test accuracy, and whether it is more than noise; None for one seed alone."""
    rows = {Case.read(key): row["test"] for key, row in runs.items()}
    seeds = [case.seed for case in rows if (case.model, case.kind) == (model, ours)]
    gains = [
        rows[Case(model, ours, seed)] - rows[other] for seed in seeds if (other := Case(model, theirs, seed)) in rows
    ]
    if len(gains) < 2:
        return None
    mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    return mean, abs(mean) > max(NOISE, 2 * error)


def lead(runs: Mapping[str, Mapping[str, float]], default: str) -> str:
    """A row a network and rival: mean of the paired differences in points, with a star where it is more than noise."""
    pairs = dict.fromkeys((Case.read(key).model, Case.read(key).kind) for key in runs)
    gains = {pair: gain(runs, pair[0], default, pair[1]) for pair in pairs if pair[1] != default}
    rows = [(*pair, f"{each[0]:+.2f}{' *' * each[1]}") for pair, each in gains.items() if each is not None]
    return table(("model", "kind", f"{default} is ahead by"), rows)


def summary(runs: Mapping[str, Mapping[str, float]]) -> str:
    """A row a network and kind; means over seeds."""
    cells: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for key, figures in runs.items():
        cells.setdefault((Case.read(key).model, Case.read(key).kind), []).append(figures)
    names = list(dict.fromkeys(name for figures in runs.values() for name in figures))
    rows = [
        (*case, *(f"{statistics.mean(row[name] for row in found):.3f}" for name in names), str(len(found)))
        for case, found in cells.items()
    ]
    return table(("model", "kind", *names, "seeds"), rows)
