"""Two fits of the same length, one plain and one compressed, and what became of the model."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch

from lightning_xai_compress import XAICompression, load_compressed

from data import ImageData


@dataclass(frozen=True)
class Outcome:
    """Test accuracies in percent, file sizes in bytes, and the largest difference of a weight after reloading."""

    seed: int
    dense_accuracy: float
    accuracy: float
    dense_bytes: int
    bytes: int
    reload_difference: float
    dense_seconds: float
    seconds: float

    @property
    def lost(self) -> float:
        return self.dense_accuracy - self.accuracy

    @property
    def reduction(self) -> float:
        return 1 - self.bytes / self.dense_bytes


def compare(
    make_model: Callable[[], L.LightningModule],
    make_data: Callable[[int], ImageData],
    make_compression: Callable[[str], XAICompression],
    *,
    epochs: int,
    seed: int,
    folder: Path,
    quiet: bool = False,
) -> Outcome:
    """Train a dense model and a compressed one, reload the file, and read the test set once for each."""
    if quiet:
        silence()
    dense, _, dense_seconds = _fit(make_model, make_data, None, epochs, seed, folder, quiet)
    compression = make_compression(str(folder))
    compressed, model, seconds = _fit(make_model, make_data, compression, epochs, seed, folder, quiet)
    reloaded = load_compressed(folder / "model.safetensors", make_model())
    ours, theirs = model.state_dict(), reloaded.state_dict()
    difference = max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
    report = json.loads((folder / "report.json").read_text())
    sizes = report["dense"]["bytes"], report["compressed"]["bytes"]
    return Outcome(seed, dense, compressed, *sizes, difference, dense_seconds, seconds)


def silence() -> None:
    """Keep Lightning's tips out of a demo's output."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for category in (UserWarning, FutureWarning):  # the latter are of libraries about one another
        warnings.filterwarnings("ignore", category=category)


def _fit(
    make_model: Callable[[], L.LightningModule],
    make_data: Callable[[int], ImageData],
    compression: XAICompression | None,
    epochs: int,
    seed: int,
    folder: Path,
    quiet: bool,
) -> tuple[float, L.LightningModule, float]:
    L.seed_everything(seed, verbose=False)
    model, data = make_model(), make_data(seed)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[compression] if compression is not None else [],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not quiet,
        default_root_dir=str(folder),
    )
    began = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - began
    accuracy = trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"]
    return 100 * accuracy, model, seconds


def threads() -> str:
    """What a timing depends on."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"
