"""Batches of the training data beside the training: drawn by seed, moved and transformed as the Trainer would."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset

from lightning_xai_compress.relevance import call_model, evaluation, split_batch

__all__ = [
    "calibration_batches",
    "forward",
    "tracked_norms",
    "training_batch_size",
    "update_batchnorm",
    "validation_batches",
]

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
    """Samples of one training batch, as far as the loader tells; 1 where the dataset gives whole batches."""
    loader = training_loader(trainer)
    if loader.batch_size is not None:
        return int(loader.batch_size)
    if loader.batch_sampler is None:
        return 1
    with isolate_rng():
        return max(len(next(iter(loader.batch_sampler), [])), 1)


def calibration_batches(trainer: Trainer, *, samples: int, seed: int) -> Iterator[Any]:
    """Draw training samples in an order of their own; the training's own iterators are not touched.

    Only samples that the loader's sampler gives are drawn. Every rank draws the same, so that every rank decides the
    same. A dataset without a length always shows its first samples.

    Args:
        trainer: Within fit, once its training data is set up.
        samples: About how many; whole batches, and fewer only where there is less than one.
        seed: Decides which.

    Raises:
        ValueError: The training data is no single DataLoader, or a stream that calibration would use up.
    """
    loader = training_loader(trainer)
    size = training_batch_size(trainer)
    dataset = loader.dataset
    batch_size = None if loader.batch_sampler is None else size  # None: the dataset gives whole batches
    with seeded(seed):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            if id(iter(dataset)) == id(dataset):
                raise ValueError(
                    f"{type(dataset).__name__}.__iter__ returns the dataset itself, so calibration would use up the "
                    "training data: return a new iterator"
                )
        else:
            order = _indices(loader, at_least=samples)
            order = [order[index] for index in torch.randperm(len(order)).tolist()]
            count = -(-samples // size) * size
            dataset = Subset(dataset, order[: min(count, len(order) - len(order) % size) or len(order)])
        drawn = iter(DataLoader(dataset, batch_size=batch_size, collate_fn=loader.collate_fn))
    seen = 0
    while seen < samples:
        # the generators are the training's again whenever the caller has the turn
        with seeded(seed + seen):
            batch = next(drawn, None)
            if batch is None:
                return
            seen += _length(batch)
            batch = transfer(trainer, batch)
        yield batch


def _indices(loader: DataLoader[Any], *, at_least: int) -> list[int]:
    """Indices of the samples that the loader trains on."""
    length = len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(loader.sampler, DistributedSampler):
        return list(range(length))  # all ranks' parts
    own = loader.batch_size is None and loader.batch_sampler is not None  # a batch sampler of the user's
    source = chain.from_iterable(loader.batch_sampler) if own and loader.batch_sampler is not None else loader.sampler
    return list(islice(source, max(length, at_least)))  # a sampler may have no end


def _length(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    members = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((_length(member) for member in members if isinstance(member, Tensor | list | tuple | Mapping)), 1)


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

    Batches that give values that are not finite are left out. All other layers (dropout, say) are
    in evaluation mode; `torch.optim.swa_utils.update_bn` would train them, too, and loses each module's own flag.
    """
    if not norms:
        return
    before = _copies(norms)
    momenta = [norm.momentum for norm in norms]
    used = 0
    with evaluation(module):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
            for index, batch in enumerate(batches):
                so_far = _copies(norms)
                forward(module, batch, index)
                if all(bool(torch.isfinite(buffer).all()) for buffer, _ in so_far):
                    used += 1
                else:
                    _restore(so_far)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                norm.training = False
            if used:  # the counter goes on counting training batches
                before = [(buffer, copy) for buffer, copy in before if not buffer.is_floating_point()]
            _restore(before)


def forward(module: LightningModule, batch: Any, index: int) -> None:
    """One forward pass, for what layers see of it."""
    if callable(own := getattr(module, "relevance_step", None)):
        own(batch, index)
    else:
        args, kwargs, _ = split_batch(batch)
        call_model(module, args, kwargs)


def _copies(norms: Sequence[Norm]) -> list[tuple[Tensor, Tensor]]:
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]


def _restore(copies: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, copy in copies:
        buffer.copy_(copy)
