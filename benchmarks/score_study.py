"""Which function of relevance and weight ranks weights best: the family Q^a |w'|, its starts, and LAMP's normalization.

    python benchmarks/score_study.py [--models lenet cnn] [--reductions 97.5 99] [--scores NAME ...] [--seeds 0 1 2]
                                     [--learning-rate X] [--weight-decay X] [--untaught] [--output FILE.json]

Every score compresses the same dense checkpoint of `fashion_bench.py` (which is trained if it is not there) to the
same bytes by the same recipe. Judged is the file read back, on the 5,000 validation images: the test images are not
touched. Results are written as they come, and a run that is there is not done again.

| name | score |
|---|---|
| qA, A = 0, 25, 50, 75, 100 | Q^(A/100) abs(w'), start relevance the margin |
| qA@logit | the same, start relevance the logit of the true class |
| ...+lamp | its square over the sum of all squares in its layer that are not smaller |
| ...+uniform | 4 bits for all weights instead of mixed ones |
| magnitude, lamp, wanda, fisher, taylor | the package's criteria of these names |
| sign | q100, and half as much for weights of relevance <= 0 |
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xai_compress import Pruning, ScoreMap, XAICompression, load_compressed, score
from lightning_xai_compress.tables import table

from common import RESULTS, Results, environment
from fashion_fit import Data, common_settings, fit_base, load_dense, network, prepare, train, trainer_of
from fashion_grid import FULL, Recipe
from fashion_tasks import DENSE, Base

SCORES = ("q0", "q25", "q50", "q75", "q100", "q50@logit", "q100@logit", "q50+lamp", "lamp", "fisher", "sign")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet", "cnn"])
    parser.add_argument("--reductions", type=float, nargs="+", default=[97.5, 99.0])
    parser.add_argument("--scores", nargs="+", default=[*SCORES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--untaught", action="store_true", help="without the dense model as a teacher")
    parser.add_argument("--learning-rate", type=float, default=FULL.learning_rate)
    parser.add_argument("--weight-decay", type=float, default=FULL.weight_decay)
    parser.add_argument("--cache", type=Path, default=Path("artifacts/benchmark"))
    parser.add_argument("--output", type=Path, default=RESULTS / "score_study.json")
    arguments = parser.parse_args()
    prepare()
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"runs": {}}
    results = Results(arguments.output, **{**found, "environment": environment(arguments.seeds)})
    recipe = replace(
        FULL,
        distillation=None if arguments.untaught else FULL.distillation,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
    )
    taught = "untaught" if arguments.untaught else "taught"
    recipe_key = f"lr{arguments.learning_rate:g}/decay{arguments.weight_decay:g}/{taught}"
    for seed in arguments.seeds:
        for model in arguments.models:
            fit_base(Base(model, seed, DENSE), FULL, arguments.cache)
            for reduction in arguments.reductions:
                for name in arguments.scores:
                    key = f"{model}/{name}/{reduction:g}/{recipe_key}/seed{seed}"
                    if key not in results.content["runs"]:
                        folder = arguments.cache / "score_study" / key
                        figures = run(Base(model, seed, DENSE), name, reduction, recipe, arguments.cache, folder)
                        results.add("runs", key, **figures)
                        print(key, results.content["runs"][key], flush=True)
    print(summary(results.content["runs"]))


def run(base: Base, name: str, reduction: float, recipe: Recipe, cache: Path, folder: Path) -> dict[str, float]:
    """Compress by one score; validation accuracy of the file in percent, and what it is made of."""
    criterion, *marks = name.split("+")
    model, seed = base.model, base.seed
    net = network(model, seed, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    load_dense(net, model, seed, FULL, cache)
    compression = XAICompression(
        target_size=round(1 - reduction / 100, 6),
        criterion=member(criterion) if criterion[0] == "q" or criterion == "sign" else criterion,
        pruning=Pruning(normalization="lamp" if "lamp" in marks else None),
        selection="least",
        bits=(4,) if "uniform" in marks else (2, 3, 4, 6, 8),
        export_dir=str(folder),
        **common_settings(recipe),
    )
    seconds = train(net, seed, recipe, [compression])
    read = load_compressed(folder / "model.safetensors", network(model, seed))
    value = trainer_of(recipe).validate(read, datamodule=Data(recipe, 0), verbose=False)[0]["val_acc"]
    size, report = (folder / "model.safetensors").stat().st_size, compression.report
    return {"val": 100 * value, "bytes": size, "sparsity": report.sparsity if report else 0.0, "seconds": seconds}


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


def summary(runs: Mapping[str, Mapping[str, float]]) -> str:
    """A row a score, a column a network and size; means over seeds."""
    cells: dict[str, dict[str, list[float]]] = {}
    for key, values in runs.items():
        model, name, *column, _ = key.split("/")
        cells.setdefault(name, {}).setdefault(" ".join([model, *column]), []).append(values["val"])
    columns = list(dict.fromkeys(column for each in cells.values() for column in each))
    rows = [
        (
            name,
            *(
                f"{sum(found) / len(found):.2f} ({len(found)})" if (found := each.get(column)) else ""
                for column in columns
            ),
        )
        for name, each in cells.items()
    ]
    return table(("score", *columns), rows)


if __name__ == "__main__":
    main()
