"""What a relevance pass costs, as a ratio to ordinary training steps on the same batches.

    python benchmarks/relevance_cost.py [--quick] [--threads N] [--rounds N] [--output FILE.json]

A training step is a forward and backward pass of `model.train()` with cross-entropy that gives the gradients of all
parameters; no optimizer. A relevance pass is one call of `score` with its default start ("margin") and epsilon (1e-6).
Both see the same few batches a call, as users do: what `score` does once a call (copies of the buffers, checks, the
scores themselves) is in its figures, shared by the batches. Models are randomly initialised, with ten classes.

| variant | call |
|---|---|
| epsilon | signed mean alone: `score(model, batches, statistics=())` |
| all_statistics | with root mean square, mean of absolute values and positive mass |
| zplus | z+ rule, signed mean alone |

FLOPs are those that torch counts: convolutions, matrix products and attention; in the weight gradients of depthwise
convolutions it forgets the groups, so that those of mobilenet_v2 tell little. Times are medians over rounds of the
ratio within a round; `checks` take processor time, all threads together, and time on the clock stands beside it. Peak
memory is that of all tensors allocated beyond model and batches, in a fresh process for each figure.

Beside it, on the same batches: zennit's heat map of the input, without weights; a naive recorder of per-weight
relevance on zennit's hooks; and captum's heat map, on vgg11_bn, since on resnet18 its relevance explodes. All three
run with ReLUs out of place.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from captum.attr import LRP  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer, mobilenet_v2, resnet18, vgg11_bn
from zennit.composites import LayerMapComposite, layer_map_base
from zennit.core import Stabilizer
from zennit.rules import Epsilon
from zennit.torchvision import ResNetCanonizer
from zennit.types import Convolution, Linear

from lightning_xai_compress import score

from common import RESULTS, Peak, Results, environment, paired, peak_memory, print_checks, ratio

LIMITS = {
    "epsilon_flops_resnet18": 1.01,
    "epsilon_cpu_resnet18": 1.15,
    "epsilon_cpu_mobilenet_v2": 1.8,
    "epsilon_cpu_vgg11_bn": 1.6,
    "all_statistics_cpu_resnet18": 1.9,
    "zplus_flops_resnet18": 1.45,
    "epsilon_cpu_vit": 1.6,
    "epsilon_memory_resnet18": 1.6,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "epsilon": {"statistics": ()},
    "all_statistics": {"statistics": ("rms", "absolute", "positive")},
    "zplus": {"statistics": (), "composite": "zplus"},
}
CLASSES = 10
SEED = 0
STEP = "training_step"

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Args:
        rounds: Of timing.
        batch_size, image_size: Of one batch.
        batches: In one call.
        growth: Numbers of batches over which time and memory are drawn.
    """

    rounds: int = 5
    batch_size: int = 32
    image_size: int = 64
    batches: int = 8
    growth: tuple[int, ...] = (1, 2, 4, 8, 12)


QUICK = Settings(rounds=2, batch_size=4, image_size=32, batches=2, growth=(1, 2))


def vit(image_size: int) -> nn.Module:
    model = VisionTransformer(
        image_size=image_size,
        patch_size=8,
        num_layers=12,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=CLASSES,
    )
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision has zeros, and so no gradient below
    return cast(nn.Module, model)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda image_size: resnet18(num_classes=CLASSES),
    "mobilenet_v2": lambda image_size: mobilenet_v2(num_classes=CLASSES),
    "vgg11_bn": lambda image_size: vgg11_bn(num_classes=CLASSES),
    "vit": vit,
}


def build(name: str, settings: Settings, batches: int) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(SEED)
    model = MODELS[name](settings.image_size)
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    return model, [(torch.randn(shape), torch.randint(0, CLASSES, shape[:1])) for _ in range(batches)]


# --- what is compared


def training_steps(model: nn.Module, batches: list[Batch]) -> None:
    model.train()
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()


def heat_maps_of_zennit(model: nn.Module, batches: list[Batch]) -> None:
    model.eval()
    with zennit_epsilon().context(model) as hooked:
        for x, y in batches:
            x = x.clone().requires_grad_()
            logits = hooked(x + 0)  # + 0: torch's counter of FLOPs takes no leaves
            torch.autograd.grad(logits, x, start(logits, y))


def heat_maps_of_captum(model: nn.Module, batches: list[Batch]) -> None:
    model.eval()
    for x, y in batches:
        LRP(model).attribute(x.clone().requires_grad_() + 0, target=y)


def naive_recorder(model: nn.Module, batches: list[Batch], *, epsilon: float = 1e-6) -> dict[str, Tensor]:
    """Mean relevance of each weight from what zennit passes from layer to layer.

    Hooks keep the input of each layer and the relevance that arrives at its output; the weight gradient of x and R / z
    is taken afterwards, layer by layer, with one more forward pass of the layer.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    stabilize = Stabilizer(epsilon)
    with zennit_epsilon(epsilon).context(model) as hooked:
        layers = {name: layer for name, layer in hooked.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        inputs: dict[str, Tensor] = {}
        relevance: dict[str, Tensor] = {}

        def keep(name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach()
            output.register_hook(partial(relevance.__setitem__, name))

        handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()]
        for x, y in batches:
            x = x.clone().requires_grad_()
            logits = hooked(x + 0)  # + 0: torch's counter of FLOPs takes no leaves
            torch.autograd.grad(logits, x, start(logits, y))
            for name, layer in layers.items():
                weight = layer.weight.detach().requires_grad_()
                if isinstance(layer, nn.Conv2d):
                    z = layer._conv_forward(inputs[name], weight, layer.bias)
                else:
                    z = F.linear(inputs[name], weight, layer.bias)
                (gradient,) = torch.autograd.grad(z, weight, relevance[name] / stabilize(z.detach()))
                share = weight.detach() * gradient
                sums[name] = sums[name] + share if name in sums else share
        for handle in handles:
            handle.remove()
    samples = sum(len(y) for _, y in batches)
    return {f"{name}.weight": total / samples for name, total in sums.items()}


def zennit_epsilon(epsilon: float = 1e-6) -> LayerMapComposite:
    rules = [((Convolution, Linear), Epsilon(epsilon)), *layer_map_base(epsilon)]
    return LayerMapComposite(rules, canonizers=[ResNetCanonizer()])


def start(logits: Tensor, y: Tensor) -> Tensor:
    """The same start as `score` takes: each logit times onehot minus softmax."""
    logits = logits.detach()
    return logits * (F.one_hot(y, CLASSES) - logits.softmax(1))


def tasks_for(name: str, settings: Settings) -> dict[str, Callable[[], object]]:
    model, batches = build(name, settings, settings.batches)
    variants = VARIANTS if name == "resnet18" else {"epsilon": VARIANTS["epsilon"]}
    tasks: dict[str, Callable[[], object]] = {STEP: partial(training_steps, model, batches)}
    for variant, arguments in variants.items():
        tasks[variant] = partial(score, model, batches, **arguments)
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    if name == "resnet18":
        tasks["zennit_heat_map"] = partial(heat_maps_of_zennit, other, batches)
        tasks["naive_recorder"] = partial(naive_recorder, other, batches)
    if name == "vgg11_bn":
        tasks["captum_heat_map"] = partial(heat_maps_of_captum, other, batches)
    return tasks


# --- measuring


def measure_cost(name: str, settings: Settings, results: Results) -> None:
    """FLOPs and times of all tasks on one model."""
    tasks = tasks_for(name, settings)
    flops = {}
    for label, task in tasks.items():  # this also warms up
        with FlopCounterMode(display=False) as counter:
            task()
        flops[label] = counter.get_total_flops()
    timings = paired(tasks, rounds=settings.rounds)
    print(f"\n{name:24}{'FLOPs':>8}{'CPU':>8}{'clock':>8}   (ratio to training steps)")
    for label, timing in timings.items():
        ratios = {
            "flops_ratio": flops[label] / flops[STEP],
            "cpu_ratio": ratio(timing.cpu, timings[STEP].cpu),
            "wall_ratio": ratio(timing.wall, timings[STEP].wall),
        }
        results.add("costs", name, **{label: {**ratios, "flops": flops[label], **asdict(timing)}})
        print(f"{label:24}" + "".join(f"{each:8.3f}" for each in ratios.values()), flush=True)


def peak_of(what: str, settings: Settings, batches: int, threads: int) -> Peak:
    """Peak memory on resnet18; runs in a process of its own."""
    torch.set_num_threads(threads)
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    model, data = build("resnet18", settings, batches)
    warm_up = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))]
    if what == STEP:
        training_steps(small, warm_up)
        return peak_memory(partial(training_steps, model, data), undo=model.zero_grad)
    score(small, warm_up, **VARIANTS[what])
    return peak_memory(lambda: score(model, data, **VARIANTS[what]))


def measure_memory(settings: Settings, results: Results) -> None:
    for variant in (STEP, *VARIANTS):
        results.add("memory", **{variant: asdict(in_fresh_process(variant, settings, settings.batches))})
    step = results.content["memory"][STEP]
    print(f"\n{'peak memory, resnet18':24}{'MB':>8}{'ratio':>8}{'resident MB':>14}")
    for variant, peak in results.content["memory"].items():
        peak["ratio"] = peak["tensor_bytes"] / step["tensor_bytes"]
        megabytes = [peak[key] / 1e6 for key in ("tensor_bytes", "resident_bytes")]
        print(f"{variant:24}{megabytes[0]:8.1f}{peak['ratio']:8.3f}{megabytes[1]:14.1f}", flush=True)


@cache
def in_fresh_process(what: str, settings: Settings, batches: int) -> Peak:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler talks about itself
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_of, what, settings, batches, torch.get_num_threads()).result()


def measure_growth(settings: Settings, results: Results) -> None:
    """Time and memory over the number of samples, and how straight the lines are."""
    model, data = build("resnet18", settings, max(settings.growth))
    runs: dict[str, Callable[..., object]] = {STEP: training_steps, "epsilon": partial(score, **VARIANTS["epsilon"])}
    tasks = {
        f"{what} {count}": partial(run, model, data[:count]) for count in settings.growth for what, run in runs.items()
    }
    for what in runs:
        tasks[f"{what} {settings.growth[0]}"]()
    timings = paired(tasks, rounds=settings.rounds)
    results.add("growth", samples=[count * settings.batch_size for count in settings.growth])
    for what in runs:
        seconds = [timings[f"{what} {count}"].cpu for count in settings.growth]
        medians = [statistics.median(each) for each in seconds]
        peaks = [in_fresh_process(what, settings, count).tensor_bytes for count in settings.growth]
        figures = {
            "cpu": seconds,
            "median_cpu": medians,
            "r_squared_of_a_line": straightness([float(count) for count in settings.growth], medians),
            "tensor_bytes": peaks,
            "largest_over_smallest_peak": max(peaks) / min(peaks),
        }
        results.add("growth", **{what: figures})


def straightness(x: list[float], y: list[float]) -> float:
    """Coefficient of determination of a line through points."""
    return float(torch.corrcoef(torch.tensor([x, y], dtype=torch.float64))[0, 1] ** 2)


def plot(growth: Mapping[str, Any], path: Path) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for what, label in (("epsilon", "relevance (epsilon)"), (STEP, "training steps")):
        left.plot(growth["samples"], growth[what]["median_cpu"], "o-", label=label)
        right.plot(growth["samples"], [each / 1e6 for each in growth[what]["tensor_bytes"]], "o-", label=label)
    left.set(xlabel="samples", ylabel="processor time in s", ylim=(0, None))
    right.set(xlabel="samples", ylabel="peak memory in MB", ylim=(0, None))
    left.legend()
    figure.suptitle("resnet18")
    figure.savefig(path, dpi=150)


def checks_of(content: Mapping[str, Any]) -> dict[str, float]:
    def cost(name: str, variant: str, kind: str) -> float:
        return float(content["costs"][name][variant][f"{kind}_ratio"])

    return {
        "epsilon_flops_resnet18": cost("resnet18", "epsilon", "flops"),
        "epsilon_cpu_resnet18": cost("resnet18", "epsilon", "cpu"),
        "epsilon_cpu_mobilenet_v2": cost("mobilenet_v2", "epsilon", "cpu"),
        "epsilon_cpu_vgg11_bn": cost("vgg11_bn", "epsilon", "cpu"),
        "all_statistics_cpu_resnet18": cost("resnet18", "all_statistics", "cpu"),
        "zplus_flops_resnet18": cost("resnet18", "zplus", "flops"),
        "epsilon_cpu_vit": cost("vit", "epsilon", "cpu"),
        "epsilon_memory_resnet18": float(content["memory"]["epsilon"]["ratio"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a relevance pass costs, against training steps.")
    parser.add_argument("--quick", action="store_true", help="few rounds of small batches, only to see that it runs")
    parser.add_argument("--rounds", type=int, help="of timing")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--output", type=Path, help="JSON file; the plot goes beside it")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    settings = QUICK if arguments.quick else Settings()
    if arguments.rounds is not None:
        settings = replace(settings, rounds=arguments.rounds)
    output = arguments.output or RESULTS / f"relevance_cost{'_quick' if arguments.quick else ''}.json"
    results = Results(output, environment=environment([SEED]), settings=asdict(settings), limits=LIMITS)
    for name in MODELS:
        measure_cost(name, settings, results)
    measure_memory(settings, results)
    measure_growth(settings, results)
    plot(results.content["growth"], output.with_suffix(".png"))
    results.add(checks=checks_of(results.content))
    print()
    print_checks(results.content["checks"], LIMITS)
    print(f"\n{output}")


if __name__ == "__main__":
    main()
