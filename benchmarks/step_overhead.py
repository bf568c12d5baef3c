"""What compression adds to training: to a step, to its memory, and to a whole fit.

    python benchmarks/step_overhead.py [--quick] [--threads N] [--rounds N] [--epochs N] [--only steps|memory|fit]
                                       [--output FILE.json]

| check | what it compares |
|---|---|
| step_fashion_cnn | a step with masks and mixed precision against a plain one: the Fashion-MNIST network of the examples at batch 128, its own optimizer (SGD with Nesterov momentum and weight decay, one-cycle schedule) |
| step_resnet18 | the same on torchvision's resnet18, batch 32, images of 64x64, SGD with momentum 0.9 and weight decay 5e-4 |
| extra_bytes_per_weight | memory of a training step of that resnet18 beyond the plain one's, for each compressible weight |
| fit_fashion_cnn | the whole run of examples/fashion_mnist.py against its plain fit: scoring, BatchNorm statistics, validation and export included |

Steps are those of one real Trainer, from the first callback's `on_train_batch_start` to the last one's
`on_train_batch_end`, half of the weights pruned and 4 bits a weight on average. Of two steps that follow one another one
is plain: the session is taken from the callbacks and its hook from the optimizer. Every other pair begins with the
plain one. The check is the median over pairs of the ratio within a pair, by the clock; processor time stands beside it.

Memory counts every tensor that is alive at the start of a step, and what a step and an update (optimizer hooks and step
alone) allocate at most, in a fresh process with compression and one without; the check takes the larger difference.

A fit is timed once each way, 10 epochs of all 55,000 images by default. Scoring passes and the export are as many
whatever the number of epochs, so that a shorter fit shows a larger ratio than a longer one, never a smaller.
"""  # noqa: E501

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18

from lightning_xai_compress import MixedPrecision, Pruning, RelevancePruning, RelevanceScoring, Scoring, XAICompression

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from common import RESULTS, Results, Timing, environment, peak_memory, print_checks, ratio
from data import FashionMNISTData
from models import FashionNet
from runner import silence

LIMITS = {"step_fashion_cnn": 1.08, "step_resnet18": 1.2, "extra_bytes_per_weight": 5.0, "fit_fashion_cnn": 1.3}
PARTS = ("steps", "memory", "fit")
PLAIN, COMPRESSED = "plain", "compressed"
WARM_UP = 4  # steps: the first one scores, prunes and quantizes
SEED = 0


@dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Args:
        rounds: Pairs of steps.
        epochs, train_samples: Of the fits.
        scoring_samples: Of a scoring pass in the fit.
    """

    rounds: int = 60
    epochs: int = 10
    train_samples: int = 55_000
    scoring_samples: int = 1_024


QUICK = Settings(rounds=4, epochs=1, train_samples=2_560, scoring_samples=128)


class ResNet(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18(num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Task:
    """A model and the size of its batches."""

    make: Callable[[], L.LightningModule]
    batch_size: int
    image: tuple[int, int, int]


TASKS = {
    "fashion_cnn": Task(FashionNet, 128, (1, 28, 28)),
    "resnet18": Task(ResNet, 32, (3, 64, 64)),
}


class Noise(Dataset[tuple[Tensor, int]]):
    """As many random images as are asked for, of which 256 differ."""

    def __init__(self, image: tuple[int, int, int], length: int) -> None:
        self.images = torch.randn(256, *image, generator=torch.Generator().manual_seed(SEED))
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index % 256], index % 10


def fit(task: Task, callbacks: Sequence[L.Callback], steps: int) -> None:
    """Train for one epoch of so many steps, without anything around it."""
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=folder,
        )
        data = Noise(task.image, steps * task.batch_size)
        trainer.fit(task.make(), DataLoader(data, batch_size=task.batch_size))


def stages() -> tuple[RelevanceScoring, RelevancePruning, MixedPrecision]:
    """Callbacks that compress at the first batch; no export."""
    return (
        RelevanceScoring(scoring=Scoring(samples=64)),
        RelevancePruning(sparsity=0.5, selection="least", start=0, end=0.0, pruning=Pruning(steps=1)),
        MixedPrecision(average_bits=4.0, start=0),
    )


# --- a step


class Before(L.Callback):
    """The first callback: chooses whether the step is a plain one, and starts the clock."""

    def __init__(self, ours: L.Callback) -> None:
        self.ours: Any = ours
        self.session: Any = None
        self.kind = COMPRESSED
        self.cpu = self.wall = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= WARM_UP:
            pair, second = divmod(batch_idx - WARM_UP, 2)
            self.switch(trainer, PLAIN if pair % 2 == second else COMPRESSED)
        gc.collect()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def switch(self, trainer: Any, kind: str) -> None:
        self.session = self.session or self.ours.session
        if kind != self.kind:
            if kind == PLAIN:
                self.session.latent.detach()
                self.ours.session = None
            else:
                self.session.latent.attach(trainer.optimizers)
                self.ours.session = self.session
        self.kind = kind

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.switch(trainer, COMPRESSED)


class After(L.Callback):
    """The last callback: stops the clock."""

    def __init__(self, before: Before) -> None:
        self.before = before
        self.timings = {kind: Timing([], []) for kind in (PLAIN, COMPRESSED)}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        cpu, wall = time.process_time() - self.before.cpu, time.perf_counter() - self.before.wall
        if batch_idx >= WARM_UP:
            self.timings[self.before.kind].cpu.append(cpu)
            self.timings[self.before.kind].wall.append(wall)


def measure_step(name: str, settings: Settings, results: Results) -> None:
    """Times of plain and compressed steps of one model."""
    ours = stages()
    before = Before(ours[0])
    after = After(before)
    fit(TASKS[name], [before, *ours, after], WARM_UP + 2 * settings.rounds)
    plan = before.session.latent.plan()
    plain, compressed = after.timings[PLAIN], after.timings[COMPRESSED]
    figures = {
        "weights": sum(keep.numel() for keep in plan.mask.keep.values()),
        "sparsity": plan.mask.sparsity,
        "average_bits": plan.allocation.average_bits,
        "wall_ratio": ratio(compressed.wall, plain.wall),
        "cpu_ratio": ratio(compressed.cpu, plain.cpu),
        "ratio_of_median_walls": statistics.median(compressed.wall) / statistics.median(plain.wall),
    }
    results.add("steps", name, **figures, plain=asdict(plain), compressed=asdict(compressed))
    print(
        f"{name}: {1e3 * statistics.median(plain.wall):.1f} ms a plain step, with compression x "
        f"{figures['wall_ratio']:.3f} by the clock, x {figures['cpu_ratio']:.3f} of processor time",
        flush=True,
    )


# --- memory


class Memory(L.Callback):
    """Measures one step as the Trainer takes it, from within the fit."""

    def __init__(self, ours: Sequence[L.Callback]) -> None:
        self.ours = ours
        self.figures: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != WARM_UP:
            return
        optimizer = trainer.optimizers[0]

        def call(hook: str, *arguments: Any) -> None:
            for callback in self.ours:
                getattr(callback, hook)(trainer, module, *arguments)

        def gradients() -> Tensor:
            call("on_train_batch_start", batch, batch_idx)
            optimizer.zero_grad()
            loss: Tensor = module.training_step(batch, batch_idx)
            loss.backward()
            return loss.detach()

        def update(loss: Tensor) -> None:
            call("on_before_optimizer_step", optimizer)
            optimizer.step()
            call("on_train_batch_end", {"loss": loss}, batch, batch_idx)

        loss = gradients()
        self.figures["held"] = live_bytes()
        self.figures["update"] = peak_memory(lambda: update(loss)).tensor_bytes
        self.figures["step"] = peak_memory(lambda: update(gradients())).tensor_bytes


def live_bytes() -> int:
    """Bytes of all tensors that Python knows of."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor) and each.device.type == "cpu"]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def memory_of(kind: str, threads: int) -> dict[str, int]:
    """Bytes held and allocated in a step of resnet18; runs in a process of its own."""
    torch.set_num_threads(threads)
    silence()
    ours = stages() if kind == COMPRESSED else ()
    memory = Memory(ours)
    fit(TASKS["resnet18"], [memory, *ours], WARM_UP + 2)
    return memory.figures


def measure_memory(results: Results) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler talks about itself
    for kind in (PLAIN, COMPRESSED):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results.add("memory", **{kind: pool.submit(memory_of, kind, torch.get_num_threads()).result()})
    plain, compressed = (results.content["memory"][kind] for kind in (PLAIN, COMPRESSED))
    weights = sum(parameter.numel() for parameter in ResNet().parameters() if parameter.dim() > 1)
    held = (compressed["held"] - plain["held"]) / weights
    extra = {"held": held} | {
        f"{part}_peak": held + (compressed[part] - plain[part]) / weights for part in ("update", "step")
    }
    results.add("memory", weights=weights, extra_bytes_per_weight=extra)
    print("extra bytes a weight: " + ", ".join(f"{part} {value:.3f}" for part, value in extra.items()), flush=True)


# --- a fit


class FashionPart(FashionMNISTData):
    """The first training images, all for validation."""

    def __init__(self, samples: int) -> None:
        super().__init__(batch_size=128, seed=SEED)
        self.samples = samples

    def load(self) -> Any:
        (images, labels), *rest = super().load()
        return (images[: self.samples], labels[: self.samples]), *rest


def fit_fashion(settings: Settings, kind: str) -> dict[str, float]:
    """Seconds of one fit of examples/fashion_mnist.py."""
    with tempfile.TemporaryDirectory() as folder:
        compression = XAICompression(
            sparsity=0.9,
            average_bits=3.0,
            metric="val_acc",
            export_dir=folder,
            formats=["safetensors", "onnx"],
            scoring=Scoring(samples=settings.scoring_samples),
        )
        L.seed_everything(SEED, verbose=False)
        model, data = FashionNet(), FashionPart(settings.train_samples)
        trainer = L.Trainer(
            max_epochs=settings.epochs,
            callbacks=[compression] if kind == COMPRESSED else [],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=folder,
        )
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.fit(model, datamodule=data)
        return {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "val_acc": float(trainer.callback_metrics["val_acc"]),
        }


def measure_fit(settings: Settings, results: Results) -> None:
    # warms up all that is compiled or loaded
    fit_fashion(replace(settings, epochs=1, train_samples=1_280, scoring_samples=128), COMPRESSED)
    for kind in (PLAIN, COMPRESSED):
        results.add("fit", **{kind: fit_fashion(settings, kind)})
    plain, compressed = results.content["fit"][PLAIN], results.content["fit"][COMPRESSED]
    results.add("fit", **{f"{clock}_ratio": compressed[clock] / plain[clock] for clock in ("wall", "cpu")})
    print(
        f"fit of {settings.epochs} epochs: {plain['wall']:.0f} s plain, {compressed['wall']:.0f} s compressed",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What compression adds to training.")
    parser.add_argument("--quick", action="store_true", help="few steps and images, only to see that it runs")
    parser.add_argument("--rounds", type=int, help="pairs of steps")
    parser.add_argument("--epochs", type=int, help="of the fits")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="these parts alone")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    settings = QUICK if arguments.quick else Settings()
    chosen = {name: getattr(arguments, name) for name in ("rounds", "epochs") if getattr(arguments, name) is not None}
    settings = replace(settings, **chosen)
    output = arguments.output or RESULTS / f"step_overhead{'_quick' if arguments.quick else ''}.json"
    results = Results(output, environment=environment([SEED]), settings=asdict(settings), limits=LIMITS)
    silence()
    checks = {}
    if "steps" in arguments.only:
        for name in TASKS:
            measure_step(name, settings, results)
            checks[f"step_{name}"] = results.content["steps"][name]["wall_ratio"]
    if "memory" in arguments.only:
        measure_memory(results)
        checks["extra_bytes_per_weight"] = max(results.content["memory"]["extra_bytes_per_weight"].values())
    if "fit" in arguments.only:
        measure_fit(settings, results)
        checks["fit_fashion_cnn"] = results.content["fit"]["wall_ratio"]
    results.add(checks=checks)
    print()
    print_checks(checks, {name: limit for name, limit in LIMITS.items() if name in checks})
    print(f"\n{output}")


if __name__ == "__main__":
    main()
