"""Model inputs for the formats that trace, taken from the training data."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_xai_compress.callbacks.calibration import calibration_batches
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.formats import Inputs
from lightning_xai_compress.relevance import split_batch

__all__ = ["example_inputs"]

_SLICES = (slice(0, 2), slice(2, 6), slice(6, 14))


def example_inputs(session: Session, formats: tuple[str, ...], *, samples: int = 0) -> list[Inputs]:
    """A few real inputs of several batch sizes; the module's `example_input_array` where a batch does not tell.

    Args:
        session: Of the fit.
        formats: That need them, for the error.
        samples: So many more, in batches as they train, for ranges of activations.

    Raises:
        ValueError: Neither is there.
    """
    batches = calibration_batches(session.trainer, samples=max(1, samples), seed=session.scoring.seed)
    try:
        split = [split_batch(batch)[:2] for batch in batches]
    except RelevanceError as error:
        example = session.module.example_input_array
        if example is None:
            raise ValueError(
                f"formats contains {' and '.join(map(repr, formats))}, but the model's input is not known: set "
                f"example_input_array on the LightningModule ({error})"
            ) from error
        if isinstance(example, dict):
            return [Inputs((), example)]
        return [Inputs(tuple(example) if isinstance(example, tuple) else (example,))]
    args, kwargs = split[0]
    few = [
        Inputs(tuple(_slice(arg, index) for arg in args), {key: _slice(arg, index) for key, arg in kwargs.items()})
        for index in _SLICES
        if _length(args, kwargs) > index.start
    ]
    return [*few, *(Inputs(tuple(args), dict(kwargs)) for args, kwargs in split if samples)]


def _slice(value: Any, index: slice) -> Any:
    return value[index] if isinstance(value, Tensor) and value.dim() else value


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), 1)
