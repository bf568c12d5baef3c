"""The fits of the Fashion-MNIST benchmark: dense, its control, and compression, each read on the test set once."""

from __future__ import annotations

import functools
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import Distillation, Files, Pruning, Scoring, XAICompression, load_compressed
from lightning_xai_compress.report import dense_bytes

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from data import FashionMNISTData, ImageData
from fashion_grid import MEASURED, Recipe, fingerprint, fit_settings_of, settings_of
from fashion_tasks import DENSE, Base, BaseResult, Run, RunResult
from models import FashionNet, FashionResNet, ImageClassifier, LeNet300
from pitch import PitchData, PitchNet
from runner import silence

__all__ = [
    "Data",
    "Network",
    "checkpoint",
    "common_settings",
    "data_of",
    "digest",
    "evaluate",
    "fit_base",
    "fit_run",
    "inputs_of",
    "kept_weights",
    "load_dense",
    "network",
    "prepare",
    "scoring_of",
    "train",
    "trainer_of",
]

Network = ImageClassifier | PitchNet
NETWORKS: dict[str, Callable[..., Network]] = {
    "cnn": FashionNet,
    "resnet": FashionResNet,
    "lenet": LeNet300,
    "pitch": PitchNet,
}


class Data(FashionMNISTData):
    """The first images of each part; read once a process."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        super().__init__(batch_size=recipe.batch_size, seed=seed)
        self.lengths = recipe.train_samples, recipe.val_samples, recipe.test_samples

    def load(self) -> Any:
        return tuple(
            (images[:length], labels[:length]) for (images, labels), length in zip(_images(), self.lengths, strict=True)
        )


@functools.cache
def _images() -> Any:
    return FashionMNISTData().load()


def data_of(model: L.LightningModule, recipe: Recipe, seed: int) -> ImageData:
    """Images, or tones."""
    return PitchData(recipe, seed) if isinstance(model, PitchNet) else Data(recipe, seed)


def inputs_of(model: L.LightningModule, count: int) -> tuple[int, ...]:
    """Shape of so many inputs."""
    return (count, 1024) if isinstance(model, PitchNet) else (count, 1, 28, 28)


def prepare() -> None:
    """Once a process: one thread, no tips."""
    torch.set_num_threads(1)
    silence()


def checkpoint(cache: Path, base: Base, recipe: Recipe) -> Path:
    """Where a base is kept."""
    return cache / f"{base.model}-{base.seed}{'' if base.kind == DENSE else f'-control{recipe.epochs}'}.pt"


def digest(state: dict[str, Tensor]) -> str:
    """Of all values of a state dict."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def kept_weights(base: Base, recipe: Recipe, cache: Path) -> str | None:
    """Digest of a kept base; None where there is none of this recipe."""
    kept = _kept(checkpoint(cache, base, recipe))
    return None if kept is None or kept.get("recipe") != fingerprint(recipe, base) else digest(kept["state"])


def fit_base(base: Base, recipe: Recipe, cache: Path) -> BaseResult:
    """Train a dense model or its control, and keep it; one that is kept already is not trained again."""
    path = checkpoint(cache, base, recipe)
    later = {} if base.kind == DENSE else {"weight_decay": recipe.weight_decay}
    model = network(base.model, base.seed, lr=recipe.learning_rate, **later)
    start = "" if base.kind == DENSE else load_dense(model, base.model, base.seed, recipe, cache)
    kept = _kept(path)
    if kept is None or kept.get("recipe") != fingerprint(recipe, base) or kept.get("start", "") != start:
        if isinstance(model, PitchNet) and base.kind == DENSE:
            model.load_published()
            seconds = 0.0
        else:
            seconds = train(model, base.seed, recipe, first=base.kind == DENSE)
        val, test = evaluate(model, recipe)
        figures = {"val": val, "test": test, "seconds": seconds}
        kept = {"state": model.state_dict(), **figures, "recipe": fingerprint(recipe, base), "start": start}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(kept, part)
        part.replace(path)
    return BaseResult(kept["val"], kept["test"], kept["seconds"], kept["recipe"], start, digest(kept["state"]))


def fit_run(run: Run, recipe: Recipe, cache: Path) -> RunResult:
    """Compress a dense model while it trains on, and measure the file that comes of it."""
    chosen = fit_settings_of(run, recipe)
    model = network(run.model, run.seed, lr=chosen["learning_rate"], weight_decay=recipe.weight_decay)
    start = load_dense(model, run.model, run.seed, recipe, cache)
    folder = cache / run.key
    folder.mkdir(parents=True, exist_ok=True)
    compression = compression_of(run, recipe, folder)
    dense = dense_bytes(model)
    with (folder / "log.txt").open("w") as log, redirect_stdout(log):
        seconds = train(model, run.seed, recipe, [compression], val_check_interval=chosen["val_check_interval"])
    written = compression.report
    if written is None:
        raise RuntimeError(f"{run.key}: the fit ended without a report")
    file = folder / "model.safetensors"
    val, test = evaluate(load_compressed(file, network(run.model, run.seed)), recipe)
    share = settings_of(run).get("target_size")
    return RunResult(
        val=val,
        test=test,
        bytes=file.stat().st_size,
        dense_bytes=dense,
        target=None if share is None else int(share * dense),
        sparsity=written.sparsity,
        average_bits=written.average_bits,
        seconds=seconds,
        history=len(written.history),
        recipe=fingerprint(recipe, run),
        start=start,
    )


def compression_of(run: Run, recipe: Recipe, folder: Path) -> XAICompression:
    """The callback of a run."""
    settings = settings_of(run) | {"scoring": scoring_of(recipe)}
    if settings.get("metric") == MEASURED:
        settings["metric"] = MulticlassAccuracy(10, average="micro")
    if recipe.pruning_steps is not None:
        settings["pruning"] = Pruning(steps=recipe.pruning_steps)
    return XAICompression(export_dir=str(folder), **common_settings(recipe), **settings)


def common_settings(recipe: Recipe) -> dict[str, Any]:
    """Settings of `XAICompression` that are the same for everyone."""
    return {
        "warmup": 0,
        "pruning_end": recipe.pruning_end,
        "files": Files(float16=True, merge_batchnorm=True),
        "distillation": None if recipe.distillation is None else Distillation(recipe.distillation, module=""),
    }


def scoring_of(recipe: Recipe, **settings: Any) -> Scoring:
    """Of as many samples as the recipe says."""
    if recipe.scoring_samples is not None:
        settings["samples"] = recipe.scoring_samples
    return Scoring(**settings)


def network(name: str, seed: int, **settings: float) -> Network:
    """A new network."""
    L.seed_everything(seed, verbose=False)
    return NETWORKS[name](**settings)


def load_dense(model: Network, name: str, seed: int, recipe: Recipe, cache: Path) -> str:
    """Give a network the weights of its dense fit; returns their digest."""
    base = Base(name, seed, DENSE)
    path = checkpoint(cache, base, recipe)
    kept = _kept(path)
    if kept is None or kept.get("recipe") != fingerprint(recipe, base):
        raise RuntimeError(f"{path} is missing or of another recipe: expected a run of {base.key} first")
    model.load_state_dict(kept["state"])
    return digest(kept["state"])


def _kept(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True) if path.exists() else None


def train(
    model: Network,
    seed: int,
    recipe: Recipe,
    callbacks: Sequence[L.Callback] = (),
    *,
    first: bool = False,
    val_check_interval: float = 1.0,
) -> float:
    """Train; seconds. What follows the dense fit sees the images in an order of its own."""
    L.seed_everything(seed, verbose=False)
    epochs = recipe.dense_epochs if first else recipe.epochs
    trainer = trainer_of(recipe, max_epochs=epochs, callbacks=list(callbacks), val_check_interval=val_check_interval)
    began = time.perf_counter()
    trainer.fit(model, datamodule=data_of(model, recipe, seed if first else seed + 1000))
    return time.perf_counter() - began


def evaluate(model: L.LightningModule, recipe: Recipe) -> tuple[float, float]:
    """Accuracy in percent on validation and test data."""
    trainer, data = trainer_of(recipe), data_of(model, recipe, 0)
    val = trainer.validate(model, datamodule=data, verbose=False)[0]["val_acc"]
    return 100 * val, 100 * trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"]


def trainer_of(recipe: Recipe, **settings: Any) -> L.Trainer:
    """A quiet one."""
    return L.Trainer(
        accelerator="cpu",
        precision=recipe.precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **settings,
    )
