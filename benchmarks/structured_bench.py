"""Half of the operations gone by channels: which criterion chooses best, how fast it is, and all of it together.

    python benchmarks/structured_bench.py [--only PATTERN] [--seeds N ...] [--jobs N] [--quick] [--report]
                                          [--output FILE.json] [--cache FOLDER]

Networks of Fashion-MNIST start from the dense checkpoints of `fashion_bench.py`, and "pitch" is the tracker of
`pitch.py` as it was published. Images train on for the same single epoch and tones for 3, without a teacher; but
"combined" for 6 with the dense model as one. Accuracies are those of the file read back, on the validation data, by
which choices are made, and on the test data, read once. "drop" is against the same epochs without compression.

| kind | what |
|---|---|
| CRITERION | `ChannelPruning` to 50 % of the multiply-accumulate operations, nothing else, weights in fp32 |
| lrp:SCORE | the same, with another way to score a channel ("rms", "output") |
| torch_pruning | its MagnitudeImportance and BasePruner, global, to the same operations before the same epochs |
| combined | channels, weights within them, mixed bits and 8-bit activations in one fit |

Scores are of 1,024 images (the default) or 256 tones. Latencies are of ONNX files in onnxruntime, one thread, median
over rounds of the ratio to the dense fp32 file within a round. Results are written after every run; one that is there
is not done again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xai_compress import (
    ChannelPruning,
    Channels,
    CompressedExport,
    CompressionPlan,
    Distillation,
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

from common import paired, ratio
from fashion_cases import MODELS, Case, Study, evaluate, gain, mean_of
from fashion_fit import Network, fit_base, inputs_of, load_dense, network, scoring_of, train
from fashion_grid import Recipe
from fashion_tasks import CONTROL, Base

CRITERIA = ("lrp", "deeplift", "taylor", "magnitude", "batchnorm", "random", "torch_pruning")
SCORES = ("lrp:rms", "lrp:output")
DEFAULT, TOGETHER = "lrp", "combined"
SHARE = 0.5
UPPER = {"channel_latency_b1": 0.65, "channel_latency_b16": 0.65, "combined_drop": 1.0}
LOWER = {"channel_gap_to_best": 0.0, "combined_speedup": 3.0, "combined_reduction": 0.95}


def main() -> None:
    study = Study("structured", __doc__, UPPER | LOWER, taught=False, long=[TOGETHER])
    cases = study.cases((*CRITERIA, *SCORES, TOGETHER), quick=(DEFAULT, "torch_pruning", TOGETHER))
    study.work([case for case in cases if case.kind not in SCORES or case.seed < 2], run)
    for case in [] if study.options.report else map(Case.read, study.runs):
        if case.kind in (DEFAULT, TOGETHER) and case.seed == 0:  # its own process has the machine for itself
            study.results.add("latency", case.key, **latency(case, study.cache, study.options.rounds))
    study.tell(checks(study.results.content), DEFAULT)


def run(case: Case, recipe: Recipe, cache: Path) -> dict[str, float]:
    """Train; accuracies in percent, bytes and operations of what the file holds."""
    net = network(case.model, case.seed, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    load_dense(net, case.model, case.seed, recipe, cache)
    folder = case.folder(cache, "structured")
    control = fit_base(Base(case.model, case.seed, CONTROL), recipe, cache)
    dense, before = dense_bytes(net), _macs(net)
    if case.kind == "torch_pruning":
        pruned_by_torch_pruning(net)
        train(net, case.seed, recipe)
        _save_floats(net, folder)
        small = net
    else:
        train(net, case.seed, recipe, callbacks_of(case, folder, recipe))
        small = load_compressed(folder / "model.safetensors", network(case.model, case.seed))
    measured: Any = OnnxModule(folder / "model.onnx") if case.kind == TOGETHER else small
    val, test = evaluate(measured, case, recipe)
    # together means in one file: that which is fast
    counted = "model.onnx" if case.kind == TOGETHER else "model.safetensors"
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
    if case.kind == TOGETHER:
        return [
            XAICompression(
                structure="channel",
                channels=Channels(macs=0.33),
                target_size=0.025,
                warmup=0,
                scoring=scoring_of(recipe),
                pruning_end=end,
                bits=(2, 4),  # integer types of ONNX
                quantization=Quantization(activations="int8"),
                distillation=Distillation(module="", outputs="labels" if case.model == "pitch" else "classes"),
                files=Files(activations="int8", float16=True, merge_batchnorm=True),
                formats=("safetensors", "onnx"),
                export_dir=str(folder),
            )
        ]
    name, _, score = case.kind.partition(":")
    criterion: Any = batchnorm_scale if name == "batchnorm" else name
    return [
        RelevanceScoring(criterion=criterion, scoring=scoring_of(recipe)),
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


def pruned_by_torch_pruning(net: Network) -> None:
    """By the library's own importance and pruner, in place, to the same share of operations."""
    import torch_pruning

    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    target = SHARE * _macs(net)
    net.eval()
    pruner = torch_pruning.pruner.BasePruner(
        net,
        torch.zeros(inputs_of(net, 1)),
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


def _macs(net: Network) -> float:
    net = copy.deepcopy(net).eval()
    counted, rest = macs_of(net, lambda: net(torch.zeros(inputs_of(net, 1))))
    return sum(counted.values()) + rest


def _save_floats(net: Network, folder: Path) -> None:
    keep = {name: torch.ones_like(each, dtype=torch.bool) for name, each in net.named_parameters() if each.dim() > 1}
    example = [Inputs((torch.zeros(inputs_of(net, size)),)) for size in (2, 4)]
    save(net.eval(), CompressionPlan(Mask(keep)), folder, formats=["safetensors", "onnx"], examples=example)


def latency(case: Case, cache: Path, rounds: int) -> dict[str, float]:
    """Time of a file over that of the dense model in fp32, at batch 1 and 16."""
    dense = cache / "structured" / f"{case.model}-dense"
    net = network(case.model, 0)
    _save_floats(net, dense)
    found = {}
    for batch in (1, 16):
        shape = inputs_of(net, batch)
        tasks = {
            "dense": _runner(dense / "model.onnx", shape),
            "small": _runner(case.folder(cache, "structured") / "model.onnx", shape),
        }
        for task in tasks.values():
            task()
        timings = paired(tasks, rounds=rounds)
        found[f"b{batch}"] = ratio(timings["small"].wall, timings["dense"].wall)
    return found


def _runner(path: Path, shape: tuple[int, ...]) -> Callable[[], object]:
    session = onnx_session(path, threads=1)
    inputs = {session.get_inputs()[0].name: torch.rand(shape).numpy()}
    repeat = 200 if shape[0] == 1 else 30
    return lambda: [session.run(None, inputs) for _ in range(repeat)]


def checks(content: Mapping[str, Any]) -> dict[str, float]:
    """The figures that have limits, as far as there is data for them."""
    runs, found = content["runs"], dict[str, float]()
    pairs = [(model, rival) for model in MODELS for rival in CRITERIA if rival != DEFAULT]
    gaps = [each for each in (gain(runs, model, DEFAULT, rival) for model, rival in pairs) if each is not None]
    found["channel_gap_to_best"] = min([0.0, *(points for points, counts in gaps if counts)])
    timed = {Case.read(key): figures for key, figures in content["latency"].items()}
    small = [figures for case, figures in timed.items() if case.kind == DEFAULT]
    for batch in ("b1", "b16"):
        if small:
            found[f"channel_latency_{batch}"] = max(each[batch] for each in small)
    together = [figures for case, figures in timed.items() if case.kind == TOGETHER]
    if together:
        found["combined_speedup"] = min(1 / max(each["b1"], each["b16"]) for each in together)
    drops, reductions = (
        [each for model in MODELS if (each := mean_of(runs, model, TOGETHER, name)) is not None]
        for name in ("drop", "reduction")
    )
    if drops:
        found |= {"combined_drop": max(drops), "combined_reduction": min(reductions)}
    return found


if __name__ == "__main__":
    main()
