"""Two data sets of real images that need no download: scikit-learn's digits, and Fashion-MNIST where Debian put it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

Images = tuple[Tensor, Tensor]

FASHION_MNIST_DIRS = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw")


class ImageData(L.LightningDataModule):
    """Images in memory: training in shuffled batches, a validation split for all choices, a test set read once.

    The order of each epoch is drawn from seed and epoch alone, so that a resumed fit sees what it would have seen.
    """

    flip = False  # mirror half of the training images

    def __init__(self, batch_size: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.train: TensorDataset
        self.val: TensorDataset
        self.test: TensorDataset

    def load(self) -> tuple[Images, Images, Images]:
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        self.train, self.val, self.test = (ImageDataset(*images) for images in self.load())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not (self.flip and self.trainer is not None and self.trainer.training):
            return batch
        images, labels = batch
        mirrored = torch.rand(len(images), device=images.device) < 0.5
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images), labels

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        sampler = EpochSampler(len(self.train), self.seed)
        return DataLoader(self.train, batch_size=self.batch_size, sampler=sampler, drop_last=True, collate_fn=as_it_is)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return _in_order(self.val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return _in_order(self.test)


class ImageDataset(TensorDataset):
    """Gives a whole batch at a time: images one by one take longer than a small network trains on them."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


def as_it_is(batch: Any) -> Any:
    return batch


class EpochSampler(torch.utils.data.Sampler[int]):
    """A permutation a epoch; Lightning tells the epoch."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self):  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class DigitsData(ImageData):
    """scikit-learn's digits: 1,797 images of 8x8, of which 400 are for the test and 200 for validation."""

    def load(self) -> tuple[Images, Images, Images]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        parts = order.split([len(images) - 600, 200, 400])
        train, val, test = ((images[part], labels[part]) for part in parts)
        return train, val, test


class FashionMNISTData(ImageData):
    """The 70,000 images of Fashion-MNIST: 55,000 to train, 5,000 for validation, 10,000 for the test.

    Args:
        batch_size: Images a training batch.
        seed: Of the training order.
        root: Folder of the four idx files; by default where Debian's `dataset-fashion-mnist` has them. Elsewhere
            torchvision downloads them to `data/`.
    """

    flip = True

    def __init__(self, batch_size: int = 128, seed: int = 0, root: str | None = None) -> None:
        super().__init__(batch_size, seed)
        self.root = root

    def load(self) -> tuple[Images, Images, Images]:
        folder = self._folder()
        images, labels = _idx(folder, "train-images-idx3-ubyte"), _idx(folder, "train-labels-idx1-ubyte")
        x, y = _scale(images), torch.tensor(labels, dtype=torch.long)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, val = order[5_000:], order[:5_000]
        test = _idx(folder, "t10k-images-idx3-ubyte"), _idx(folder, "t10k-labels-idx1-ubyte")
        return (x[train], y[train]), (x[val], y[val]), (_scale(test[0]), torch.tensor(test[1], dtype=torch.long))

    def _folder(self) -> Path:
        candidates = [self.root] if self.root is not None else [*FASHION_MNIST_DIRS]
        for candidate in candidates:
            if candidate is not None and any(Path(candidate).glob("train-images-idx3-ubyte*")):
                return Path(candidate)
        if self.root is None:
            from torchvision.datasets import FashionMNIST

            FashionMNIST("data", download=True)
            return Path("data/FashionMNIST/raw")
        raise FileNotFoundError(
            f"no train-images-idx3-ubyte(.gz) in {self.root}: on Debian `apt-get install dataset-fashion-mnist` "
            f"puts it into {FASHION_MNIST_DIRS[0]}"
        )


def _idx(folder: Path, name: str) -> np.ndarray:
    """Read an idx file (big-endian header: type, number of dimensions, sizes), gzipped or not."""
    path = folder / name
    content = path.read_bytes() if os.path.exists(path) else gzip.decompress((folder / f"{name}.gz").read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _scale(images: np.ndarray) -> Tensor:
    return (torch.tensor(images, dtype=torch.float32).unsqueeze(1) / 255 - 0.286) / 0.353


def _in_order(dataset: Dataset[tuple[Tensor, ...]]) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(dataset, batch_size=500, collate_fn=as_it_is)
