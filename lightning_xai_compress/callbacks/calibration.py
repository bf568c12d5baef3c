"""Batches of the training data beside the training: drawn by seed, moved and transformed as the Trainer would."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_xai_compress.relevance import call_model, evaluation, split_batch

__all__ = ["calibration_batches", "tracked_norms", "training_batch_size", "update_batchnorm", "validation_batches"]

Norm = nn.modules.batchnorm._BatchNorm


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all generators inside, and give the training its own states back afterwards."""
    with isolate_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


def training_loader(trainer: Trainer) -> DataLoader[Any]:
    """The training DataLoader.

    Raises:
        ValueError: The training data is no single DataLoader.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"calibration needs the training data as one torch DataLoader, got {type(loader).__name__}: return a "
            "DataLoader from train_dataloader()"
        )
    return loader


def training_batch_size(trainer: Trainer) -> int:
    """Samples of one training batch, as far as the loader tells."""
    loader = training_loader(trainer)
    sampler_size = getattr(loader.batch_sampler, "batch_size", None)
    return int(loader.batch_size or sampler_size or 1)


def calibration_batches(trainer: Trainer, *, samples: int, seed: int) -> Iterator[Any]:
    """Draw training samples in an order of their own; the training's own iterators are not touched.

    Every rank draws the same samples, so that every rank decides the same without talking.

    Args:
        trainer: Within fit, once its training data is set up.
        samples: About how many; whole batches.
        seed: Decides which.
    """
    loader = training_loader(trainer)
    size = training_batch_size(trainer)
    count = max(1, -(-samples // size))
    dataset = loader.dataset
    batches: Iterable[Any]
    batch_size = None if loader.batch_sampler is None else size  # None: the dataset gives whole batches
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        batches = DataLoader(dataset, batch_size=batch_size, collate_fn=loader.collate_fn)
    else:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(dataset), generator=generator)[: count * size].tolist()
        batches = DataLoader(Subset(dataset, order), batch_size=batch_size, collate_fn=loader.collate_fn)
    with seeded(seed):
        drawn = iter(batches)
    for _ in range(count):
        # the generators are the training's again whenever the caller has the turn
        with seeded(seed):
            batch = next(drawn, None)
            seed += 1
            if batch is None:
                return
            batch = transfer(trainer, batch)
        yield batch


def transfer(trainer: Trainer, batch: Any) -> Any:
    """Convert, move and transform a batch as the Trainer does, the user's batch hooks included."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def validation_batches(trainer: Trainer) -> Iterator[Any]:
    """The validation batches as the Trainer would give them; none where there is no validation."""
    loaders = trainer.val_dataloaders
    if loaders is None:
        return
    members = list(loaders.values()) if isinstance(loaders, dict) else loaders
    members = members if isinstance(members, Sequence) else [members]
    limits = trainer.num_val_batches or [float("inf")] * len(members)
    for loader, limit in zip(members, limits, strict=True):
        for batch in islice(loader, None if limit == float("inf") else int(limit)):
            yield transfer(trainer, batch)


def tracked_norms(model: nn.Module) -> list[Norm]:
    """BatchNorm layers that are gathering running statistics now; frozen ones (in evaluation mode) are not."""
    return [
        module
        for module in model.modules()
        if isinstance(module, Norm) and module.training and module.running_mean is not None
    ]


@torch.no_grad()
def update_batchnorm(module: LightningModule, norms: Sequence[Norm], batches: Iterable[Any]) -> None:
    """Estimate BatchNorm statistics anew, as the plain mean over batches.

    Where the batches give values that are not finite the statistics so far stay. All other layers (dropout, say) are
    in evaluation mode; `torch.optim.swa_utils.update_bn` would train them, too, and loses each module's own flag.
    """
    if not norms:
        return
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    with evaluation(module):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
            for index, batch in enumerate(batches):
                if callable(own := getattr(module, "relevance_step", None)):
                    own(batch, index)
                else:
                    args, kwargs, _ = split_batch(batch)
                    call_model(module, args, kwargs)
        finally:
            for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                norm.training = False
                for name, buffer in norm.named_buffers():
                    if name == "num_batches_tracked" or not torch.isfinite(buffer).all():
                        buffer.copy_(buffers[name])
