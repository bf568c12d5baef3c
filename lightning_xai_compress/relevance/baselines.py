"""What DeepLIFT compares an input with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_xai_compress.checks import check_number
from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.relevance.explain import input_tensors

__all__ = ["Baseline", "BaselineName", "blurred", "check_baseline", "mean_inputs", "references"]

BaselineName = Literal["mean", "blurred"]
Baseline = float | BaselineName | Tensor | list[Tensor] | tuple[Tensor, ...]

_BLUR = 0.1  # standard deviation of the blur over the length of a dimension


def check_baseline(baseline: Baseline) -> None:
    """Refuse what is no baseline.

    Raises:
        ValueError: No finite number, no such name, or a tensor that is not of finite numbers.
    """
    if isinstance(baseline, Tensor):
        if not torch.isfinite(baseline).all():
            raise ValueError("a baseline must be finite: the tensor holds NaN or infinity")
    elif isinstance(baseline, list | tuple):
        if not baseline or not all(isinstance(each, Tensor) for each in baseline):
            raise ValueError(f"a list as baseline must hold a tensor for each input, got {baseline!r}")
        for each in baseline:
            check_baseline(each)
    elif isinstance(baseline, str):
        if baseline not in get_args(BaselineName):
            raise ValueError(
                f"baseline must be a number, {', '.join(map(repr, get_args(BaselineName)))}, a tensor or a list of "
                f"tensors, got {baseline!r}"
            )
    else:
        check_number("baseline", baseline)


def mean_inputs(batches: Iterable[Any]) -> list[Tensor]:
    """Mean over all samples of each floating-point input, of the shape of one sample.

    Args:
        batches: As for `score`; gone through once.

    Raises:
        RelevanceError: No samples, no floating-point input, or samples of different shapes.
    """
    sums: list[Tensor] = []
    samples = 0
    for index, batch in enumerate(batches):
        inputs = [x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in input_tensors(batch)]
        shapes = [tuple(x.shape[1:]) for x in inputs]
        if sums and shapes != (known := [tuple(each.shape) for each in sums]):
            raise RelevanceError(
                f"baseline='mean' needs samples of one shape, but batch {index} has {shapes} where others have {known}"
            )
        sums = [each + x.sum(0) for each, x in zip(sums, inputs, strict=True)] if sums else [x.sum(0) for x in inputs]
        samples += len(inputs[0]) if inputs else 0
    if not samples:
        raise RelevanceError("there is no mean input: expected batches with samples of floating-point numbers")
    return [each / samples for each in sums]


def references(baseline: Baseline, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The baseline of each input, in its shape.

    Args:
        baseline: Anything but "mean", which is known from all batches.
        inputs: Floating-point inputs, shape [samples, ...] each.

    Raises:
        RelevanceError: A tensor that does not broadcast to its input, another number of tensors than inputs, or an
            input that cannot be blurred.
    """
    if isinstance(baseline, str):
        return [blurred(x) for x in inputs]
    if isinstance(baseline, list | tuple):
        if len(baseline) != len(inputs):
            raise RelevanceError(f"expected a baseline for each of the {len(inputs)} inputs, got {len(baseline)}")
        return [_broadcast(baseline[at], x, f" of input {at}") for at, x in enumerate(inputs)]
    return [_broadcast(baseline, x) for x in inputs]


def blurred(x: Tensor) -> Tensor:
    """Each sample under a Gaussian, along all dimensions after the channels.

    Its standard deviation is a tenth of the length of the dimension; at the borders the part inside is normalized.

    Args:
        x: Shape [samples, channels, positions, ...].

    Raises:
        RelevanceError: There are no positions.
    """
    if x.dim() < 3:
        raise RelevanceError(
            f"baseline='blurred' blurs along the dimensions after samples and channels, which an input of shape "
            f"{tuple(x.shape)} has not: use a number, 'mean' or a tensor"
        )
    for dimension in range(2, x.dim()):
        at = torch.arange(x.shape[dimension], dtype=x.dtype, device=x.device)
        distance = (at - at[:, None]) / max(_BLUR * len(at), 1e-6)
        weights = torch.softmax(-distance.square() / 2, dim=1)
        x = (x.movedim(dimension, -1) @ weights.T).movedim(-1, dimension)
    return x


def _broadcast(baseline: float | Tensor, x: Tensor, which: str = "") -> Tensor:
    tensor = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    try:
        return tensor.broadcast_to(x.shape).clone()
    except RuntimeError as error:
        raise RelevanceError(
            f"a baseline of shape {tuple(tensor.shape)} does not broadcast to an input of {tuple(x.shape)}{which}"
        ) from error
