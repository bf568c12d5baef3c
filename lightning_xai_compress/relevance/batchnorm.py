"""BatchNorm statistics of a model, estimated anew for the weights that it has now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xai_compress.relevance.explain import call_model, split_batch
from lightning_xai_compress.relevance.isolation import evaluation

__all__ = ["forward", "tracked_norms", "update_batchnorm"]

Norm = nn.modules.batchnorm._BatchNorm


def tracked_norms(model: nn.Module, *, gathering: bool = True) -> list[Norm]:
    """BatchNorm layers that have running statistics.

    Args:
        model: Any module.
        gathering: Only those that are gathering them now; frozen ones (in evaluation mode) are not.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, Norm) and module.running_mean is not None and (module.training or not gathering)
    ]


@torch.no_grad()
def update_batchnorm(module: nn.Module, norms: Sequence[Norm], batches: Iterable[Any]) -> int:
    """Estimate BatchNorm statistics anew, as the plain mean over batches.

    Batches that give values that are not finite, or a single value a channel, are left out. All other layers
    (dropout, say) are in evaluation mode; `torch.optim.swa_utils.update_bn` would train them, too, and loses each
    module's own flag.

    Args:
        module: Any; its `relevance_step`, where it has one, says what is run.
        norms: Whose statistics are estimated.
        batches: On the model's device.

    Returns:
        How many batches were used; without any, statistics stay as they are.
    """
    if not norms:
        return 0
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
                try:
                    forward(module, batch, index)
                except ValueError as error:
                    if "more than 1 value per channel" not in str(error):  # torch refuses a batch of one sample
                        raise
                    _restore(so_far)
                    continue
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
    return used


def forward(module: nn.Module, batch: Any, index: int) -> None:
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
