"""Model inputs for the formats that trace, taken from the training data."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_xai_compress.callbacks.calibration import calibration_batches, training_batch_size
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.errors import ArtifactError, RelevanceError
from lightning_xai_compress.formats import Inputs, check_call
from lightning_xai_compress.relevance import split_batch

__all__ = ["example_inputs"]

_SLICES = (slice(0, 2), slice(2, 6), slice(6, 14))
_BATCHES = 4  # are looked at, for sizes that differ between them


def example_inputs(session: Session, formats: tuple[str, ...], *, samples: int = 0) -> list[Inputs]:
    """A few real inputs of several batch sizes, and of each other size that some batches have.

    The module's `example_input_array` instead, where a batch does not tell what forward takes.

    Args:
        session: Of the fit.
        formats: Or settings that need them, for the error.
        samples: So many more, in batches as they train, for ranges of activations.

    Raises:
        ValueError: Neither is there.
    """
    # generous, since a dataset may give whole batches of any size
    most = max(samples, 64 * _BATCHES * training_batch_size(session.trainer))
    split: list[Inputs] = []
    try:
        for batch in calibration_batches(session.trainer, samples=most, seed=session.scorer.settings.seed):
            args, kwargs, _ = split_batch(batch)
            split.append(Inputs(tuple(args), dict(kwargs)))
            if len(split) >= _BATCHES and sum(map(_length, split)) >= samples:
                break
        if not split:
            raise RelevanceError("the training data gives no batch")
        few = [_slice(split[0], index) for index in _SLICES if _length(split[0]) > index.start]
        check_call(session.module, few[0])
    except (RelevanceError, ArtifactError) as error:
        example = session.module.example_input_array
        if example is None:
            raise ValueError(
                f"{' and '.join(formats)} must call the model, but the model's input is not known: set "
                f"example_input_array on the LightningModule ({error})"
            ) from error
        if samples:
            rank_zero_warn(
                "ranges of 8-bit activations come from example_input_array alone, since batches do not tell what "
                "forward takes: let it hold real data, some hundred samples"
            )
        if isinstance(example, dict):
            return [Inputs((), example)]
        return [Inputs(tuple(example) if isinstance(example, tuple) else (example,))]
    seen = {_sizes(few[0])}
    for other in split[1:]:
        if _sizes(other) not in seen:
            seen.add(_sizes(other))
            few.append(_slice(other, _SLICES[0]))
    return [*few, *(split if samples else ())]


def _slice(inputs: Inputs, index: slice) -> Inputs:
    def part(value: Any) -> Any:
        return value[index] if isinstance(value, Tensor) and value.dim() else value

    return Inputs(tuple(map(part, inputs.args)), {key: part(value) for key, value in (inputs.kwargs or {}).items()})


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [value for value in (*inputs.args, *(inputs.kwargs or {}).values()) if isinstance(value, Tensor)]


def _length(inputs: Inputs) -> int:
    return next((len(value) for value in _tensors(inputs) if value.dim()), 1)


def _sizes(inputs: Inputs) -> tuple[tuple[int, ...], ...]:
    """All but the batch."""
    return tuple(tuple(value.shape[1:]) for value in _tensors(inputs))
