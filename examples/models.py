"""Ordinary LightningModules: nothing in them knows of compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class ImageClassifier(L.LightningModule):
    """Convolutions with BatchNorm, global pooling, one linear layer.

    Args:
        widths: Channels of the 3x3 convolutions.
        strides: Their strides.
        lr: Peak learning rate of a one-cycle schedule over the whole fit.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], *, lr: float = 0.1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width, stride in zip((1, *widths), widths, strides, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)).to(
            memory_format=torch.channels_last
        )
        self.lr = lr
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images.contiguous(memory_format=torch.channels_last))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, stage: str) -> None:
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels))
        self.log(f"{stage}_acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        decayed = [parameter for parameter in self.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.parameters() if parameter.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps, pct_start=0.25)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DigitsNet(ImageClassifier):
    """0.11 M weights for 8x8 images."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__((32, 64, 96), (1, 2, 1), lr=lr)


class FashionNet(ImageClassifier):
    """0.34 M weights for 28x28 images."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__((32, 48, 64, 96, 128, 112), (1, 2, 1, 2, 1, 1), lr=lr)
