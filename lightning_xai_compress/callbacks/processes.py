"""What is shared between the processes of a fit, and which ways of sharing a model between devices are understood."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_xai_compress.errors import (
    ArtifactError,
    CompressionError,
    LatentCopyError,
    NonFiniteError,
    RelevanceError,
)
from lightning_xai_compress.plan import ScoreMap

__all__ = ["Processes", "check_strategy", "check_whole", "unpadded"]

_ERRORS = (NonFiniteError, RelevanceError, ArtifactError, LatentCopyError, CompressionError)
_WHOLE = {"SingleDeviceStrategy", "DDPStrategy"}
_SPLIT = ("FSDP", "DeepSpeed", "ModelParallel", "Megatron", "Sharded")  # some of them inherit from DDPStrategy
_INSTEAD = "use Trainer(strategy='auto') for one device, or strategy='ddp' or 'ddp_spawn' for several"


class Processes:
    """The processes of a fit; every method that talks to the others must be called by all of them alike.

    Args:
        trainer: With its strategy set up.

    Attributes:
        rank: Of this process, from 0.
        world: How many there are.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.rank = trainer.global_rank
        self.world = trainer.world_size
        self._strategy = trainer.strategy

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes, equal to the last bit on all; the tensor may be used up."""
        if self.world == 1:
            return tensor
        result: Tensor = self._strategy.reduce(tensor.contiguous(), reduce_op="sum")
        return result

    def alike(self, scores: ScoreMap) -> ScoreMap:
        """The mean of scores that each process made of the same samples: equal to the last bit on all."""
        if self.world == 1:
            return scores

        def mean(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: self.total(tensor.clone()) / self.world for name, tensor in tensors.items()}

        return replace(
            scores,
            score=mean(scores.score),
            relevance=mean(scores.relevance),
            sensitivity=mean(scores.sensitivity),
            absolute=mean(scores.absolute),
        )

    def number(self, value: float | Tensor | None) -> float | None:
        """Mean over the processes that have a number; None where none has."""
        if self.world == 1:
            return None if value is None else float(value)
        pair = torch.zeros(2, dtype=torch.float64, device=self._strategy.root_device)
        if value is not None:
            pair[0], pair[1] = float(value), 1
        together, count = self.total(pair).tolist()
        return together / count if count else None

    def shared(self, value: Any) -> Any:
        """What global rank zero gives, on all processes."""
        return self._strategy.broadcast(value) if self.world > 1 else value

    @torch.no_grad()
    def share_buffers(self, module: nn.Module) -> None:
        """BatchNorm's running statistics of global rank zero, for all: what a model in evaluation mode shows.

        Other buffers stay each process's own: a queue of samples or a counter is nobody else's, and whether they are
        shared is for `DDPStrategy(broadcast_buffers=...)` to say.
        """
        if self.world == 1:
            return
        for norm in module.modules():
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            for buffer in (norm.running_mean, norm.running_var, norm.num_batches_tracked):
                if buffer is not None:
                    received = buffer.contiguous().clone()
                    torch.distributed.broadcast(received, 0)  # not by the strategy, which goes through pickle
                    buffer.copy_(received)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one process fails on all: nobody waits for a process that has given up.

        Raises:
            CompressionError: That of the first process that has one.
        """
        error: CompressionError | None = None
        try:
            yield
        except CompressionError as caught:
            error = caught
        self._agree(error)

    def _agree(self, error: CompressionError | None) -> None:
        if self.world == 1:
            if error is not None:
                raise error
            return
        failed = torch.zeros(self.world, device=self._strategy.root_device)
        failed[self.rank] = error is not None
        ranks = self.total(failed).nonzero().flatten().tolist()
        if not ranks:
            return
        # as plain types, since an error of the user's need not survive pickle
        own = (next((i for i, kind in enumerate(_ERRORS) if isinstance(error, kind)), 0), str(error))
        number, text = self._strategy.broadcast(own, ranks[0])
        raise _ERRORS[number](f"{text} (in process {ranks[0]})") from error


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that do not keep the weights whole and alike on every device.

    Raises:
        ValueError: It says what to use instead.
    """
    name = type(strategy).__name__
    kinds = {kind.__name__ for kind in type(strategy).__mro__}  # of lightning or of pytorch_lightning
    if any("XLA" in kind for kind in kinds):
        raise ValueError(f"{name} is not supported: relevance is computed step by step, not by XLA; {_INSTEAD}")
    if not kinds & _WHOLE or any(part in kind for part in _SPLIT for kind in kinds):
        raise ValueError(
            f"{name} is not supported: weights must be whole on every device, and no part of them elsewhere; {_INSTEAD}"
        )
    if getattr(strategy, "_model_averaging_period", None) is not None:
        raise ValueError(
            f"{name} with model_averaging_period lets the processes train apart and averages their weights, which "
            "fills pruned weights and leaves the grid: leave model_averaging_period and ddp_comm_state out"
        )


def check_whole(module: nn.Module) -> None:
    """Refuse parameters that are shards, whoever made them so.

    Raises:
        ValueError: It names one.
    """
    for name, parameter in module.named_parameters():
        kinds = {kind.__name__ for kind in type(parameter).__mro__} | {type(parameter.data).__name__}
        if kinds & {"DTensor", "FlatParameter"}:
            raise ValueError(
                f"{name} is a shard ({type(parameter.data).__name__}), but weights must be whole on every device: "
                "leave fully_shard and parallelize_module out"
            )


def shared_out(sampler: DistributedSampler[Any]) -> list[int] | None:
    """All indices that a sampler shares out between the processes, each once; None where it goes its own way."""
    whole = copy.copy(sampler)
    if hasattr(whole.dataset, "reset"):  # Lightning's wrapper of another sampler: its list is in use
        whole.dataset = copy.copy(whole.dataset)
    count = len(whole.dataset)  # type: ignore[arg-type]
    whole.num_replicas, whole.rank, whole.num_samples, whole.total_size = 1, 0, count, count
    try:
        indices = list(whole)
    except Exception:  # a class of the user's that keeps books of its own
        return None
    return indices if len(indices) == count else None


def unpadded(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader without the samples that a `DistributedSampler` repeats (or drops) to give all processes as many.

    A process that would be left without any keeps a repeated one. Loaders that iterate in their own way stay as they
    are.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or type(loader).__iter__ is not DataLoader.__iter__:
        return loader
    if len(sampler.dataset) % sampler.num_replicas == 0 or (indices := shared_out(sampler)) is None:  # type: ignore[arg-type]
        return loader
    own = indices[sampler.rank :: sampler.num_replicas] or indices[:1]
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=own,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
