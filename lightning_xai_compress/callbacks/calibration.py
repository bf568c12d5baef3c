"""Batches of the training data beside the training: drawn by seed, moved and transformed as the Trainer would."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from lightning_xai_compress.callbacks.processes import unpadded
from lightning_xai_compress.callbacks.randomness import seeded
from lightning_xai_compress.callbacks.sampling import Member, batch_size_of

__all__ = ["calibration_batches", "set_epoch", "training_batch_size", "validation_batches"]


def training_loaders(trainer: Trainer) -> list[DataLoader[Any]]:
    """The training DataLoaders, in the order in which they stand in the loader that combines them.

    Raises:
        ValueError: Something else than a DataLoader trains, or they train one after the other.
    """
    given = trainer.train_dataloader
    loaders = [given] if isinstance(given, DataLoader) else CombinedLoader(given).flattened
    if getattr(getattr(trainer.fit_loop, "_combined_loader", None), "_mode", None) == "sequential":
        raise ValueError(
            "a CombinedLoader with mode='sequential' cannot train: use 'max_size_cycle', 'min_size' or 'max_size'"
        )
    for loader in loaders:
        if not isinstance(loader, DataLoader):
            raise ValueError(
                "calibration needs the training data as torch DataLoaders (one, or a dict or list of them), got "
                f"{type(loader).__name__}: return a DataLoader from train_dataloader()"
            )
    return loaders


def training_batch_size(trainer: Trainer) -> int:
    """Samples of one training batch, as far as the (first) loader tells; 1 where the dataset gives whole batches."""
    return batch_size_of(training_loaders(trainer)[0])


def calibration_batches(trainer: Trainer, *, samples: int, seed: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Any]:
    """Draw training samples in an order of their own; the training's own iterators and samplers are not touched.

    Only samples that the loaders' samplers give are drawn. Every rank draws the same, so that every rank decides the
    same. A dataset without a length always shows its first samples. Of several loaders, each batch holds one batch of
    each, in the structure in which they train; those that are used up begin anew until all have been through once.

    Args:
        trainer: Within fit, once its training data is set up.
        samples: About how many (of the first loader, and over all shards); whole batches, and fewer only where there
            is less than one.
        seed: Decides which.
        shard: (rank, world): give only every world-th batch, beginning with the rank-th. All shards together give
            the batches of (0, 1); what a shard passes over is neither collated nor moved, and not even read where
            the loader has a batch size.

    Raises:
        ValueError: The training data is not made of DataLoaders, or a stream that calibration would use up.
    """
    rank, world = shard
    loaders = training_loaders(trainer)
    overfits = getattr(trainer, "overfit_batches", 0)
    batches = int(trainer.num_training_batches) if overfits else None
    with seeded(seed):
        members = [Member(loader, at_least=samples, batches=batches) for loader in loaders]
    generators = [each for member in members for each in member.generators]
    structure = None if isinstance(trainer.train_dataloader, DataLoader) else CombinedLoader(trainer.train_dataloader)
    seen = 0
    for index in count():
        if seen >= samples:
            return
        wanted = index % world == rank
        # the generators are the training's again whenever the caller has the turn
        with seeded(seed + index, generators):
            drawn = [each for member in members if (each := member.draw(wanted)) is not None]
            if len(drawn) < len(members) or all(member.through for member in members):
                return
            seen += drawn[0][1]
            if not wanted:
                continue
            batch = drawn[0][0]
            if structure is not None:
                structure.flattened = [each for each, _ in drawn]
                batch = structure.iterables
            batch = transfer(trainer, batch)
        yield batch


def set_epoch(trainer: Trainer, epoch: int) -> None:
    """Tell samplers the epoch, as Lightning does at its start."""
    for loader in CombinedLoader(trainer.train_dataloader).flattened:
        if callable(tell := getattr(getattr(loader, "sampler", None), "set_epoch", None)):
            tell(epoch)


def transfer(trainer: Trainer, batch: Any, dataloader_idx: int = 0) -> Any:
    """Convert, move and transform a batch as the Trainer does, the user's batch hooks included."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def validation_batches(trainer: Trainer) -> Iterator[Any]:
    """The validation batches as the Trainer would give them; none where there is no validation."""
    loaders = trainer.val_dataloaders
    if loaders is None:
        return
    members = CombinedLoader(loaders).flattened
    limits = trainer.num_val_batches or [float("inf")] * len(members)
    for index, (loader, limit) in enumerate(zip(members, limits, strict=True)):
        for batch in islice(unpadded(loader), None if limit == float("inf") else int(limit)):
            yield transfer(trainer, batch, index)
