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
    """A network for images of one channel, its accuracy, and SGD with a one-cycle schedule over the whole fit.

    Args:
        net: From images [n, 1, height, width] to logits of 10 classes.
        lr: Peak learning rate.
        weight_decay: Of all but biases and BatchNorm.
    """

    def __init__(self, net: nn.Module, *, lr: float = 0.1, weight_decay: float = 5e-4) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)
        self.lr, self.weight_decay = lr, weight_decay
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
        return one_cycle(self, self.lr, self.weight_decay)


def one_cycle(module: L.LightningModule, lr: float, weight_decay: float) -> Any:
    """SGD with a one-cycle schedule over the whole fit; biases and BatchNorm do not decay."""
    decayed = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in module.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, int(module.trainer.estimated_stepping_batches), pct_start=0.25
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def convolutions(widths: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    """3x3 convolutions with BatchNorm, global pooling, one linear layer."""
    layers: list[nn.Module] = []
    for before, width, stride in zip((1, *widths), widths, strides, strict=False):
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class DigitsNet(ImageClassifier):
    """0.11 M weights for 8x8 images."""

    def __init__(self, lr: float = 0.1, weight_decay: float = 5e-4) -> None:
        super().__init__(convolutions((32, 64, 96), (1, 2, 1)), lr=lr, weight_decay=weight_decay)


class FashionNet(ImageClassifier):
    """0.34 M weights for 28x28 images."""

    def __init__(self, lr: float = 0.1, weight_decay: float = 5e-4) -> None:
        super().__init__(convolutions((32, 48, 64, 96, 128, 112), (1, 2, 1, 2, 1, 1)), lr=lr, weight_decay=weight_decay)


class LeNet300(ImageClassifier):
    """LeNet-300-100 (LeCun et al. 1998), 0.27 M weights for 28x28 images, all of them linear."""

    def __init__(self, lr: float = 0.1, weight_decay: float = 5e-4) -> None:
        layers = (nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
        super().__init__(nn.Sequential(nn.Flatten(), *layers), lr=lr, weight_decay=weight_decay)


class FashionResNet(ImageClassifier):
    """ResNet-20 (He et al. 2016), 0.27 M weights; its first convolution halves the 28x28 images, for speed."""

    def __init__(self, lr: float = 0.1, weight_decay: float = 5e-4) -> None:
        blocks = [Residual(16, 16) for _ in range(3)]
        for width in (32, 64):
            blocks += [Residual(width // 2, width, stride=2), Residual(width, width), Residual(width, width)]
        first = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
        super().__init__(nn.Sequential(*first, *blocks, *last), lr=lr, weight_decay=weight_decay)


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))
