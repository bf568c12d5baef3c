"""Norms of what each weight is multiplied with, for criteria that look at activations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xai_compress.errors import NonFiniteError, RelevanceError
from lightning_xai_compress.relevance.explain import Explain
from lightning_xai_compress.relevance.interception import Interception
from lightning_xai_compress.relevance.isolation import isolated
from lightning_xai_compress.relevance.operations import operation
from lightning_xai_compress.relevance.statistics import Processes, RelevanceSums

__all__ = ["input_norms"]


def input_norms(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str],
    explain: Explain = "margin",
    processes: Processes | None = None,
    on_batch: Callable[[], None] | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Mean over samples of the summed square of the input that each weight meets.

    Args:
        model, batches, layers, explain, on_batch: As for `relevance_sums`.
        processes: As for `score`.

    Returns:
        Means in the shape of the weights (NaN for rows that were not used), and the number of samples.

    Raises:
        RelevanceError: No samples, or a batch that is not understood.
        NonFiniteError: An input that is not finite.
    """
    together = nullcontext() if processes is None else processes.together()
    with together, isolated(model, layers) as copy:
        sums = RelevanceSums({name: copy.leaves[name].detach() for name in layers})
        mode = _Norms(copy.leaves, sums)
        for index, batch in enumerate(batches):
            copy.check_device(batch, index)
            prepared, _ = copy.prepare(batch)
            with mode:
                sums.samples += copy.run(prepared, index, explain).batch_size
            mode.end_batch()
            if on_batch is not None:
                on_batch()
    if processes is not None:
        sums.reduce(processes.total)
    if not sums.samples:
        raise RelevanceError("there was no sample to score: expected at least one batch with samples")
    norms = {}
    for name, weight in sums.weights.items():
        norms[name] = sums.sums["square"].take(name).div_(sums.samples)
        if not torch.isfinite(norms[name]).all():
            raise NonFiniteError(f"the input of {name} is not finite")
        norms[name].masked_fill_(~sums.seen[name].view(-1, *[1] * (weight.dim() - 1)), torch.nan)
    return norms, sums.samples


class _Norms(Interception):
    """Adds up squares in the forward pass; there is no backward pass."""

    def _layer(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        z: Tensor = func(input, weight, bias, *args, **kwargs)
        name, rows = self._identify(weight)
        if name in self.sums.weights:
            plain = weight.detach()
            call = operation(func, plain, args, kwargs)
            square = call.weight_gradient(input.detach().square(), plain, torch.ones_like(z.detach()))
            self.sums.add("square", name, rows, square)
            self.sums.seen[name][rows] = True
        return z
