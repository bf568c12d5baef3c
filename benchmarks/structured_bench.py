"""Half of the operations gone by channels: which criterion chooses best, how fast it is, and all of it together.

    python benchmarks/structured_bench.py [--only PATTERN] [--seeds N ...] [--jobs N] [--quick] [--report]
                                          [--output FILE.json] [--cache FOLDER]

Everything starts from the dense checkpoints of `fashion_bench.py` and trains on for the same 6 epochs by the same
recipe, without a teacher. Accuracies are those of the file read back, on the validation images, by which choices are
made, and on the test images, read once. "dense" is the same fit without compression.

| kind | what |
|---|---|
| CRITERION | `ChannelPruning` to 50 % of the multiply-accumulate operations, nothing else, weights in fp32 |
| lrp:SCORE | the same, with another way to score a channel ("mean", "rms", "output") |
| torch_pruning | its MagnitudeImportance and BasePruner, global, to the same operations before the same epochs |
| combined | channels, weights within them, mixed bits and 8-bit activations in one fit |

Latencies are of ONNX files in onnxruntime, one thread, median over rounds of the ratio to the dense fp32 file within a
round. Results are written after every run; one that is there is not done again.
"""

from __future__ import annotations

import argparse
import copy
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

import torch
from torch import Tensor, nn

from lightning_xai_compress import (
    ChannelPruning,
    Channels,
    CompressedExport,
    CompressionPlan,
    Files,
    Inputs,
    Mask,
    Quantization,
    RelevanceScoring,
    XAICompression,
    load_compressed,
    save,
)
from lightning_xai_compress.formats.onnx import OnnxModule, onnx_session
from lightning_xai_compress.report import dense_bytes
from lightning_xai_compress.structure import macs_of
from lightning_xai_compress.tables import table

from common import RESULTS, Results, environment, paired, ratio
from fashion_fit import Data, fit_base, load_dense, network, prepare, train, trainer_of
from fashion_grid import FULL, QUICK, Recipe
from fashion_tasks import CONTROL, DENSE, Base

CRITERIA = ("lrp", "deeplift", "taylor", "magnitude", "batchnorm", "random", "torch_pruning")
SCORES = ("lrp:mean", "lrp:rms", "lrp:output")
DEFAULT = "lrp"
SHARE = 0.5
UPPER = {"channel_latency_b1": 0.65, "channel_latency_b16": 0.65, "combined_drop": 1.0}
LOWER = {"channel_gap_to_best": 0.0, "combined_speedup": 3.0, "combined_reduction": 0.95}
NOISE = 0.3  # points that a difference has to exceed


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="shell pattern on keys such as cnn/lrp/seed0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, of one thread each")
    parser.add_argument("--quick", action="store_true", help="few images and one epoch, only to see that it runs")
    parser.add_argument("--report", action="store_true", help="run nothing: checks from the results")
    parser.add_argument("--rounds", type=int, default=31, help="of timing")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    prepare()
    quick = "_quick" if arguments.quick else ""
    recipe = replace(QUICK if quick else FULL, distillation=None)
    output = arguments.output or RESULTS / f"structured{quick}.json"
    cache = (arguments.cache or Path(f"artifacts/benchmark{quick}")).resolve()
    found = json.loads(output.read_text()) if output.exists() else {}
    results = Results(output, **{"runs": {}, "latency": {}, **found, "environment": environment(arguments.seeds)})
    kinds = ("lrp", "torch_pruning", "combined") if quick else (*CRITERIA, *SCORES, "combined")
    cases = [
        Case(model, kind, seed)
        for seed in ([0] if quick else arguments.seeds)
        for model in (("cnn",) if quick else ("cnn", "resnet"))
        for kind in kinds
        if kind not in SCORES or seed < 2
    ]
    done = results.content["runs"]
    chosen = [case for case in cases if fnmatchcase(case.key, arguments.only) and case.key not in done]
    if not arguments.report:
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), prepare) as pool:
            bases = dict.fromkeys((case.model, case.seed) for case in chosen)
            [*pool.map(_bases, bases, [recipe] * len(bases), [cache] * len(bases))]
            waiting = {pool.submit(run, case, recipe, cache): case for case in chosen}
            for future in as_completed(waiting):
                results.add("runs", waiting[future].key, **future.result())
                print(waiting[future].key, done[waiting[future].key], flush=True)
        for case in map(_case, done):
            if case.kind in (DEFAULT, "combined") and case.seed == 0:  # its own process has the machine for itself
                results.add("latency", case.key, **latency(case, cache, arguments.rounds))
    results.add("limits", **UPPER, **LOWER)
    results.add("checks", **checks(results.content))
    print(summary(done))
    print(json.dumps(results.content["checks"], indent=1))


def _case(key: str) -> Case:
    model, kind, seed = key.split("/")
    return Case(model, kind, int(seed.removeprefix("seed")))


def _bases(which: tuple[str, int], recipe: Recipe, cache: Path) -> None:
    for kind in (DENSE, CONTROL):
        fit_base(Base(*which, kind), recipe, cache)


def run(case: Case, recipe: Recipe, cache: Path) -> dict[str, float]:
    """Train; accuracies in percent, bytes and operations of what the file holds."""
    net = network(case.model, case.seed, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    load_dense(net, case.model, case.seed, recipe, cache)
    folder = _folder(case, cache)
    control = fit_base(Base(case.model, case.seed, CONTROL), recipe, cache)
    dense, before = dense_bytes(net), _macs(net)
    example = torch.zeros(1, 1, 28, 28)
    if case.kind == "torch_pruning":
        pruned_by_torch_pruning(net, example)
        train(net, case.seed, recipe)
        _save_floats(net, folder)
        small = net
    else:
        train(net, case.seed, recipe, callbacks_of(case, folder, recipe))
        small = load_compressed(folder / "model.safetensors", network(case.model, case.seed))
    measured: Any = OnnxModule(folder / "model.onnx") if case.kind == "combined" else small
    val, test = _evaluate(measured, case, recipe)
    # together means in one file: that which is fast
    counted = "model.onnx" if case.kind == "combined" else "model.safetensors"
    reduction = 1 - (folder / counted).stat().st_size / dense
    return {
        "val": val,
        "test": test,
        "drop": control.test - test,
        "macs": _macs(small) / before,
        "reduction": reduction,
    }


def callbacks_of(case: Case, folder: Path, recipe: Recipe) -> list[Any]:
    """What prunes and writes."""
    end = recipe.pruning_end
    if case.kind == "combined":
        return [
            XAICompression(
                structure="channel",
                channels=Channels(macs=SHARE),
                target_size=0.045,
                warmup=0,
                pruning_end=end,
                bits=(2, 3, 4, 6, 8),
                quantization=Quantization(activations="int8"),
                files=Files(activations="int8", float16=True, merge_batchnorm=True),
                formats=("safetensors", "onnx"),
                export_dir=str(folder),
            )
        ]
    name, _, score = case.kind.partition(":")
    criterion: Any = batchnorm_scale if name == "batchnorm" else name
    return [
        RelevanceScoring(criterion=criterion),
        ChannelPruning(Channels(macs=SHARE, score=score or "sum"), start=0, end=end),  # type: ignore[arg-type]
        CompressedExport(export_dir=str(folder), formats=("safetensors", "onnx"), files=Files(merge_batchnorm=True)),
    ]


def batchnorm_scale(model: nn.Module, batches: Iterable[Any], layers: Sequence[str]) -> Mapping[str, Tensor]:
    """A criterion: the scale of the BatchNorm that follows a layer, shared out over its weights (Liu et al. 2017)."""
    order = [(name, module) for name, module in model.named_modules() if not [*module.children()]]
    found = {}
    for at, (name, module) in enumerate(order):
        weight = getattr(module, "weight", None)
        if f"{name}.weight" not in layers or not isinstance(weight, Tensor):
            continue
        following = order[at + 1][1] if at + 1 < len(order) else None
        scale = weight.new_ones(len(weight))
        if isinstance(following, nn.BatchNorm2d) and len(following.weight) == len(weight):
            scale = following.weight.detach().abs()
        found[f"{name}.weight"] = (scale / weight[0].numel()).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
    return found


def pruned_by_torch_pruning(net: nn.Module, example: Tensor) -> None:
    """By the library's own importance and pruner, in place, to the same share of operations."""
    import torch_pruning

    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    target = SHARE * _macs(net)
    net.eval()
    pruner = torch_pruning.pruner.BasePruner(
        net,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(),
        global_pruning=True,
        pruning_ratio=0.9,
        max_pruning_ratio=0.9,
        iterative_steps=90,  # a percent of the channels each
        ignored_layers=[last],
        round_to=8,
    )
    while _macs(net) > target:
        pruner.step()
    net.train()


def _macs(net: nn.Module) -> float:
    net = copy.deepcopy(net).eval()
    counted, rest = macs_of(net, lambda: net(torch.zeros(1, 1, 28, 28)))
    return sum(counted.values()) + rest


def _save_floats(net: nn.Module, folder: Path) -> None:
    keep = {name: torch.ones_like(each, dtype=torch.bool) for name, each in net.named_parameters() if each.dim() > 1}
    example = [Inputs((torch.zeros(size, 1, 28, 28),)) for size in (2, 4)]
    save(net.eval(), CompressionPlan(Mask(keep)), folder, formats=["safetensors", "onnx"], examples=example)


def _evaluate(model: Any, case: Case, recipe: Recipe) -> tuple[float, float]:
    """Accuracy in percent on validation and test images."""
    judge = network(case.model, case.seed)
    if isinstance(model, OnnxModule):
        judge.net = model
    else:
        judge = model
    trainer, data = trainer_of(recipe), Data(recipe, 0)
    val = trainer.validate(judge, datamodule=data, verbose=False)[0]["val_acc"]
    return 100 * val, 100 * trainer.test(judge, datamodule=data, verbose=False)[0]["test_acc"]


def _folder(case: Case, cache: Path) -> Path:
    return cache / "structured" / case.key.replace(":", "-")


def latency(case: Case, cache: Path, rounds: int) -> dict[str, float]:
    """Time of a file over that of the dense model in fp32, at batch 1 and 16."""
    dense = cache / "structured" / f"{case.model}-dense"
    _save_floats(network(case.model, 0), dense)
    found = {}
    for batch in (1, 16):
        tasks = {
            "dense": _runner(dense / "model.onnx", batch),
            "small": _runner(_folder(case, cache) / "model.onnx", batch),
        }
        for task in tasks.values():
            task()
        timings = paired(tasks, rounds=rounds)
        found[f"b{batch}"] = ratio(timings["small"].wall, timings["dense"].wall)
    return found


def _runner(path: Path, batch: int) -> Callable[[], object]:
    session = onnx_session(path, threads=1)
    inputs = {session.get_inputs()[0].name: torch.rand(batch, 1, 28, 28).numpy()}
    repeat = 200 if batch == 1 else 30
    return lambda: [session.run(None, inputs) for _ in range(repeat)]


def checks(content: Mapping[str, Any]) -> dict[str, float]:
    """The figures that have limits, as far as there is data for them."""
    runs = {_case(key): figures for key, figures in content["runs"].items()}
    found: dict[str, float] = {}
    gaps = [0.0]
    for model in ("cnn", "resnet"):
        for rival in CRITERIA:
            gains = [
                runs[ours]["test"] - figures["test"]
                for case, figures in runs.items()
                if (case.model, case.kind) == (model, rival) and (ours := replace(case, kind=DEFAULT)) in runs
            ]
            if rival != DEFAULT and len(gains) > 1:
                error = statistics.stdev(gains) / len(gains) ** 0.5
                mean = statistics.mean(gains)
                gaps += [mean] if abs(mean) > max(NOISE, 2 * error) else []
    found["channel_gap_to_best"] = min(gaps)
    timed = {_case(key): figures for key, figures in content["latency"].items()}
    small = [figures for case, figures in timed.items() if case.kind == DEFAULT]
    for batch in ("b1", "b16"):
        if small:
            found[f"channel_latency_{batch}"] = max(each[batch] for each in small)
    together = [figures for case, figures in timed.items() if case.kind == "combined"]
    if together:
        found["combined_speedup"] = min(1 / max(each["b1"], each["b16"]) for each in together)
    for model in ("cnn", "resnet"):
        rows = [figures for case, figures in runs.items() if (case.model, case.kind) == (model, "combined")]
        if rows:
            drop, reduction = (statistics.mean(row[name] for row in rows) for name in ("drop", "reduction"))
            found["combined_drop"] = max(drop, found.get("combined_drop", drop))
            found["combined_reduction"] = min(reduction, found.get("combined_reduction", reduction))
    return found


def summary(runs: Mapping[str, Mapping[str, float]]) -> str:
    """A row a network and kind; means over seeds."""
    cells: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for key, figures in runs.items():
        cells.setdefault((_case(key).model, _case(key).kind), []).append(figures)
    names = ("val", "test", "drop", "macs", "reduction")
    rows = [
        (*case, *(f"{statistics.mean(row[name] for row in found):.3f}" for name in names), str(len(found)))
        for case, found in cells.items()
    ]
    return table(("model", "kind", *names, "seeds"), rows)


if __name__ == "__main__":
    main()
