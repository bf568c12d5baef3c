"""Which function of relevance and weight ranks weights best: the family Q^a |w'|, its starts, and LAMP's normalization.

    python benchmarks/score_study.py [--models lenet cnn] [--reductions 97.5 99] [--scores NAME ...] [--seeds 0 1 2]
                                     [--training taught|untaught|none] [--learning-rate X] [--weight-decay X]
                                     [--steps N] [--epochs N] [--jobs N] [--quick] [--report] [--output FILE.json]
                                     [--cache FOLDER]

Every score compresses the same dense checkpoint of `fashion_bench.py` (which is trained if it is not there) to the
same bytes by the same recipe. Judged is the file read back, on the 5,000 validation images: the test images are not
touched. With `--training none` it is `compress` on 1,024 training images, and nothing trains. Results are written as
they come, and a run that is there is not done again; nor is one that `fashion_bench.py` has done, whose validation
accuracies are taken from its results.

| name | score |
|---|---|
| qA, A = 0, 25, 50, 75, 100 | Q^(A/100) abs(w'), start relevance the margin |
| qA@logit | the same, start relevance the logit of the true class |
| ...+lamp | its square over the sum of all squares in its layer that are not smaller |
| ...+uniform | 4 bits for all weights instead of mixed ones |
| ...+layer, ...+group | a width for each layer, or for each 16 input channels of an output channel |
| ...+ranked | tiers by relevance instead of the knapsack |
| ...+fisher, ...+error | the knapsack weighs errors by the squared gradient, or all alike |
| magnitude, lamp, wanda, fisher, taylor | the package's criteria of these names |
| sign | q100, and half as much for weights of relevance <= 0 |
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_xai_compress import (
    Choice,
    Pruning,
    Quantization,
    ScoreMap,
    XAICompression,
    compress,
    load_compressed,
    save,
    score,
)
from lightning_xai_compress.pruning import Normalization
from lightning_xai_compress.tables import table

from common import RESULTS, Results, environment
from fashion_checks import Row
from fashion_fit import Data, common_settings, fit_base, load_dense, network, prepare, train, trainer_of
from fashion_grid import FULL, QUICK, Recipe, fingerprint
from fashion_tasks import DENSE, Base

ALLOCATIONS = {
    "layer": Quantization(bits_per="layer"),
    "group": Quantization(bits_per="group", group_size=16),
    "ranked": Quantization(strategy="ranked"),
    "fisher": Quantization(sensitivity="fisher"),
    "error": Quantization(sensitivity="error"),
}
Training = Literal["taught", "untaught", "none"]

SCORES = ("q0", "q25", "q50", "q75", "q50@logit", "q100@logit", "q50+lamp", "q100+lamp", "sign")


@dataclass(frozen=True)
class Case:
    """One compression.

    Args:
        model, reduction, seed: What is compressed how far, in percent.
        score: A name of the table above.
        training: Whether the dense model teaches while the compressed one trains on, or nothing trains any more.
        steps: Of pruning.
        epochs: Of the compression; without training they mean nothing.
    """

    model: str
    score: str
    reduction: float
    seed: int
    learning_rate: float = FULL.learning_rate
    weight_decay: float = FULL.weight_decay
    training: Training = "taught"
    steps: int = Pruning().steps
    epochs: int = FULL.epochs

    def changed(self, recipe: Recipe) -> Recipe:
        """The recipe of the benchmark, but for what is studied."""
        return replace(
            recipe,
            distillation=recipe.distillation if self.training == "taught" else None,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            epochs=self.epochs,
        )

    def __post_init__(self) -> None:
        marks = set(self.score.split("+")[1:])
        known = {"lamp", "uniform", *(() if self.training == "none" else ALLOCATIONS)}
        if marks - known:
            raise ValueError(f"{self.score}: expected marks out of {sorted(known)} with training {self.training}")

    @property
    def conditions(self) -> str:
        """All but model, size, score and seed."""
        if self.training == "none":
            return f"no training, {self.steps} steps"
        numbers = f"learning rate {self.learning_rate:g}, weight decay {self.weight_decay:g}, {self.steps} steps"
        return f"{self.training}, {self.epochs} epoch{'s' if self.epochs > 1 else ''}, {numbers}"

    @property
    def key(self) -> str:
        """Its name in the results."""
        what = f"{self.model}/{self.score}/{self.reduction:g}/{self.training}"
        numbers = f"lr{self.learning_rate:g}/decay{self.weight_decay:g}/steps{self.steps}/epochs{self.epochs}"
        return f"{what}/{numbers}/seed{self.seed}"

    @classmethod
    def read(cls, key: str) -> Case:
        """The case of a key."""
        model, name, reduction, training, rate, decay, steps, epochs, seed = key.split("/")
        return cls(
            model,
            name,
            float(reduction),
            int(seed.removeprefix("seed")),
            float(rate.removeprefix("lr")),
            float(decay.removeprefix("decay")),
            training,  # type: ignore[arg-type]
            int(steps.removeprefix("steps")),
            int(epochs.removeprefix("epochs")),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet", "cnn"])
    parser.add_argument("--reductions", type=float, nargs="+", default=[97.5, 99.0])
    parser.add_argument("--scores", nargs="+", default=[*SCORES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--training",
        choices=("taught", "untaught", "none"),
        default="taught",
        help="by the dense model, not by it, or not at all",
    )
    parser.add_argument("--learning-rate", type=float, default=FULL.learning_rate)
    parser.add_argument("--weight-decay", type=float, default=FULL.weight_decay)
    parser.add_argument("--steps", type=int, default=Pruning().steps, help="of pruning")
    parser.add_argument("--epochs", type=int, help="of the compression")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, of one thread each")
    parser.add_argument("--quick", action="store_true", help="one epoch on few images, only to see that it runs")
    parser.add_argument("--report", action="store_true", help="run nothing: tables from the results")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    recipe, quick = (QUICK, "_quick") if arguments.quick else (FULL, "")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    prepare()
    cache = (arguments.cache or Path(f"artifacts/benchmark{quick}")).resolve()
    output = arguments.output or RESULTS / f"score_study{quick}.json"
    found = json.loads(output.read_text()) if output.exists() else {"runs": {}}
    known = of_benchmark(RESULTS / "fashion_mnist.json", recipe)
    if not arguments.report:
        results = Results(output, **{**found, "environment": environment(arguments.seeds)})
        epochs = arguments.epochs or recipe.epochs
        numbers = arguments.learning_rate, arguments.weight_decay, arguments.training, arguments.steps, epochs
        cases = [
            case
            for seed in arguments.seeds
            for model in arguments.models
            for reduction in arguments.reductions
            for name in arguments.scores
            if (case := Case(model, name, reduction, seed, *numbers)) not in known
            and case.key not in results.content["runs"]
        ]
        for base in dict.fromkeys(Base(case.model, case.seed, DENSE) for case in cases):
            fit_base(base, recipe, cache)
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), prepare) as pool:
            waiting = {pool.submit(run, case, recipe, cache): case for case in cases}
            for left, future in enumerate(as_completed(waiting)):
                key = waiting[future].key
                results.add("runs", key, **future.result())
                print(f"{key}: {results.content['runs'][key]}, {len(cases) - left - 1} left", flush=True)
        found = results.content
    print(summary(known | {Case.read(key): values["val"] for key, values in found["runs"].items()}))


def of_benchmark(path: Path, recipe: Recipe) -> dict[Case, float]:
    """Validation accuracies of the benchmark's own runs to a size."""
    content = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    found = {}
    for row in map(Row.read, content["runs"].values()):
        if row.run.budget.kind == "size" and row.recipe == fingerprint(recipe, row.run):
            name = "q100" if row.run.method.name == "default" else row.run.method.name
            name += "+uniform" if row.run.method.widths == "uniform" else ""
            found[Case(row.run.model, name, row.run.budget.value, row.run.seed, epochs=recipe.epochs)] = row.val
    return found


def run(case: Case, recipe: Recipe, cache: Path) -> dict[str, float]:
    """Compress; validation accuracy of the file in percent, and what it is made of."""
    criterion, *marks = case.score.split("+")
    dense, recipe, folder = recipe, case.changed(recipe), cache / "score_study" / case.key
    net = network(case.model, case.seed, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    load_dense(net, case.model, case.seed, dense, cache)
    normalization: Normalization | None = "lamp" if "lamp" in marks else None
    settings: dict[str, Any] = {
        "target_size": round(1 - case.reduction / 100, 6),
        "criterion": member(criterion) if criterion[0] == "q" or criterion == "sign" else criterion,
        "selection": "least",
        "bits": (4,) if "uniform" in marks else (2, 3, 4, 6, 8),
    }
    began = time.perf_counter()
    if case.training == "none":
        batches, files = _batches(case.seed, recipe), common_settings(recipe)["files"]
        choice = Choice(normalization=normalization)
        compressed = compress(net, batches, choice=choice, steps=case.steps, files=files, **settings)
        save(net, compressed.plan, folder, files=files)
        sparsity = compressed.report.sparsity
    else:
        pruning = Pruning(normalization=normalization, steps=case.steps)
        chosen = [ALLOCATIONS[mark] for mark in marks if mark in ALLOCATIONS]
        settings |= {"quantization": chosen[0]} if chosen else {}
        callback = XAICompression(pruning=pruning, export_dir=str(folder), **common_settings(recipe), **settings)
        train(net, case.seed, recipe, [callback])
        sparsity = callback.report.sparsity if callback.report else 0.0
    seconds = time.perf_counter() - began
    read = load_compressed(folder / "model.safetensors", network(case.model, case.seed))
    value = trainer_of(recipe).validate(read, datamodule=Data(recipe, 0), verbose=False)[0]["val_acc"]
    size = (folder / "model.safetensors").stat().st_size
    return {"val": 100 * value, "bytes": size, "sparsity": sparsity, "seconds": seconds}


def _batches(seed: int, recipe: Recipe) -> list[Any]:
    """1,024 training images."""
    data = Data(recipe, seed)
    data.setup("fit")
    return list(itertools.islice(data.train_dataloader(), 1024 // recipe.batch_size))


def member(name: str) -> Callable[[nn.Module, Iterable[Any], Sequence[str]], ScoreMap]:
    """A criterion of the family."""
    power, _, start = name.removeprefix("q").partition("@")

    def criterion(model: nn.Module, batches: Iterable[Any], layers: Sequence[str]) -> ScoreMap:
        scores = score(model, batches, "lrp", layers=layers, explain=start or "margin")  # type: ignore[arg-type]
        if name == "sign":
            halved = {
                key: torch.where(scores.relevance[key] <= 0, each / 2, each) for key, each in scores.score.items()
            }
            return replace(scores, score=halved)
        return replace(scores, score=_family(scores, int(power) / 100))

    criterion.__name__ = name
    return criterion


def _family(scores: ScoreMap, power: float) -> dict[str, Tensor]:
    """The package's score is Q |w'|."""
    return {
        name: each * torch.where(scores.rms[name] > 0, scores.rms[name], 1.0) ** (power - 1)
        for name, each in scores.score.items()
    }


def summary(found: Mapping[Case, float]) -> str:
    """Under each of the conditions a table: a row a score, a column a network and size; means over seeds.

    The last column is the mean of the paired differences from q100 over all networks, sizes and seeds that both have,
    and its standard error.
    """
    parts = []
    for conditions in dict.fromkeys(case.conditions for case in found):
        cases = {case: value for case, value in found.items() if case.conditions == conditions}
        columns = sorted({(case.model, case.reduction) for case in cases})
        rows = []
        for name in dict.fromkeys(case.score for case in cases):
            cells = [
                [value for case, value in cases.items() if (case.score, case.model, case.reduction) == (name, *column)]
                for column in columns
            ]
            differences = [
                value - cases[other]
                for case, value in cases.items()
                if case.score == name and (other := replace(case, score="q100")) in cases
            ]
            rows.append((name, *map(_mean, cells), _mean(differences, signed=True) if name != "q100" else ""))
        header = ("score", *(f"{model} {reduction:g} %" for model, reduction in columns), "against q100")
        parts.append(f"{conditions}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def _mean(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and, of differences, its standard error; how many in parentheses."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.2f}"
    if signed and len(values) > 1:
        mean += f" +- {statistics.stdev(values) / math.sqrt(len(values)):.2f}"
    return f"{mean} ({len(values)})"


if __name__ == "__main__":
    main()
