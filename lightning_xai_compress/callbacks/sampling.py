"""Batches of one DataLoader beside the training, which finds its loader, sampler and dataset as it left them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy, deepcopy
from itertools import chain, islice
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_xai_compress.callbacks.randomness import Generator, generators_in

__all__ = ["Member", "batch_size_of"]


class Member:
    """Draws batches of one loader, in an order of its own; used up, it begins anew.

    To be made and used under a seed. No worker is started, the sampler is a copy and so is the dataset's outer object,
    so that counters in them do not move.

    Args:
        loader: Its dataset, sampler, batch size and collate function are used.
        at_least: Samples that will be asked for, where its sampler has no end.
        batches: Only so many batches of an epoch, as Trainer(overfit_batches=...) trains; None for all.

    Raises:
        ValueError: A stream that calibration would use up.
    """

    def __init__(self, loader: DataLoader[Any], *, at_least: int, batches: int | None = None) -> None:
        self.through = False
        self._collate = loader.collate_fn
        self._whole = loader.batch_sampler is None  # the dataset gives whole batches
        self._size = batch_size_of(loader)
        self._drop_last = bool(loader.drop_last)
        self._batches = batches
        self._dataset: Any = _shallow(loader.dataset)
        self._order: list[Any] | None = None
        if not isinstance(loader.dataset, IterableDataset) and hasattr(loader.dataset, "__len__"):
            order = _indices(loader, at_least=at_least)
            self._order = order[: batches * self._size] if batches is not None else order
        self._picks = self._begin()

    @property
    def generators(self) -> list[Generator]:
        """Generators that a draw may use, beside the global ones."""
        return generators_in(self._dataset, self._collate)

    def draw(self, wanted: bool = True) -> tuple[Any, int] | None:
        """The next batch and the number of its samples; at the end `through` is set and it begins anew.

        Args:
            wanted: Whether the batch is needed; else it is passed over, without reading its samples where their
                number is known.

        Returns:
            None where there is no data at all.
        """
        for _ in range(2):
            pick = next(self._picks, None)
            if pick is not None:
                return self._read(pick, wanted)
            self.through = True
            self._picks = self._begin()
        return None

    def _begin(self) -> Iterator[list[Any]]:
        """What the batches are made of: lists of indices, or of samples where it is a stream."""
        if self._order is None:
            stream = iter(self._dataset)
            if stream is self._dataset or stream is iter(self._dataset):
                raise ValueError(
                    f"{type(self._dataset).__name__}.__iter__ returns the dataset itself, or twice the same iterator, "
                    "so calibration would use up the training data: return a new iterator"
                )
            return islice(self._chunks(stream, short=not self._drop_last), self._batches)
        order = [self._order[index] for index in torch.randperm(len(self._order)).tolist()]
        return self._chunks(iter(order), short=len(order) < self._size)  # a ragged batch only where there is no other

    def _chunks(self, source: Iterator[Any], *, short: bool) -> Iterator[list[Any]]:
        size = 1 if self._whole else self._size
        while chunk := list(islice(source, size)):
            if len(chunk) == size or short:
                yield chunk

    def _read(self, pick: list[Any], wanted: bool) -> tuple[Any, int]:
        if not wanted and not self._whole:
            return None, len(pick)
        samples = pick
        if self._order is not None:
            several = getattr(self._dataset, "__getitems__", None)
            samples = several(pick) if callable(several) and not self._whole else [self._dataset[i] for i in pick]
        if self._whole:
            batch = self._collate(samples[0])
            return batch, _length(batch)
        return self._collate(samples), len(pick)


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Samples of one batch, as far as the loader tells; 1 where the dataset gives whole batches."""
    if loader.batch_size is not None:
        return int(loader.batch_size)
    if loader.batch_sampler is None:
        return 1
    with isolate_rng():
        return max(len(next(iter(_sampler_copy(loader.batch_sampler, loader)), [])), 1)


def _indices(loader: DataLoader[Any], *, at_least: int) -> list[Any]:
    """Indices of the samples that the loader trains on; all ranks' parts."""
    length = len(loader.dataset)  # type: ignore[arg-type]
    own = loader.batch_size is None and loader.batch_sampler is not None  # a batch sampler of the user's
    sampler = _sampler_copy(loader.batch_sampler if own else loader.sampler, loader)
    # a sampler may have no end
    return list(islice(chain.from_iterable(sampler) if own else sampler, max(length, at_least)))


def _sampler_copy(sampler: Any, loader: DataLoader[Any]) -> Any:
    """A sampler that may be used up, without one process's part being taken of it."""
    if isinstance(sampler, DistributedSampler):
        inner = getattr(sampler.dataset, "_sampler", None)  # what Lightning wrapped
        return range(len(loader.dataset)) if inner is None else _sampler_copy(inner, loader)  # type: ignore[arg-type]
    shared = [
        loader.dataset,
        *(each for each in getattr(sampler, "__dict__", {}).values() if isinstance(each, Dataset)),
    ]
    try:
        copied = deepcopy(sampler, {id(each): each for each in shared})
    except Exception:  # what cannot be copied (open files, say) is used as it is
        return sampler
    if isinstance(inner := getattr(copied, "sampler", None), DistributedSampler):
        copied.sampler = _sampler_copy(inner, loader)
    return copied


def _shallow(dataset: Any) -> Any:
    """The dataset with attributes of its own, so that counters do not move and files are opened beside."""
    try:
        return copy(dataset)
    except Exception:  # it refuses, and is used as it is
        return dataset


def _length(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    members = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((_length(member) for member in members if isinstance(member, Tensor | list | tuple | Mapping)), 1)
