"""What is explained: from a batch and a model to one number per sample whose relevance is passed back.

In the gradient domain (c = R / activation) the start is c = 1 at the explained tensor, so what is explained is fully
told by a tensor. The contrastive margin is the logits times minus the gradient of the loss that goes with them:
onehot - softmax for class indices and for class probabilities, target - sigmoid for labels in [0, 1] (one or several),
target - output for regression. Which of the last three it is, a target in the shape of the output tells by its values
alone; where that guess is wrong, a `relevance_step` says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_xai_compress.errors import RelevanceError

__all__ = ["Explain", "call_model", "explained_tensor", "split_batch"]

Explain = Literal["margin", "logit"]

_INPUT_KEYS = ("input", "inputs", "x", "image", "images", "features")
_TARGET_KEYS = ("target", "targets", "y", "label", "labels")
_HINT = (
    "expected (input, target, ...) or a mapping with one of the targets "
    f"{', '.join(map(repr, _TARGET_KEYS))} and one of the inputs {', '.join(map(repr, _INPUT_KEYS))} (or else all that "
    "forward takes, by name). Define relevance_step(self, batch, batch_idx) on the LightningModule and "
    "let it return the tensor to explain, for example (logits * (onehot - logits.softmax(1)).detach()).sum()"
)


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Find positional inputs, keyword inputs and target of a batch.

    A pair or longer sequence is (input, target, ...). A mapping has its target under one of the usual names; where it
    has an input under one of the usual names that is the only argument, otherwise all other entries go to the model
    as keywords, as for Hugging Face models.

    Raises:
        RelevanceError: Nothing of the kind: says what came and what to define.
    """
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and len(batch) >= 2:
        inputs, target = batch[0], batch[1]
        if isinstance(target, Tensor) and not isinstance(inputs, str | bytes):
            if isinstance(inputs, Mapping):
                return (), dict(inputs), target
            return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}, target
    if isinstance(batch, Mapping):
        target_key = next((key for key in _TARGET_KEYS if isinstance(batch.get(key), Tensor)), None)
        if target_key is not None:
            input_key = next((key for key in _INPUT_KEYS if isinstance(batch.get(key), Tensor)), None)
            if input_key is not None:
                return (batch[input_key],), {}, batch[target_key]
            rest = {key: value for key, value in batch.items() if key != target_key}
            if rest:
                return (), rest, batch[target_key]
    raise RelevanceError(f"input and target of a batch were not found: got {_describe(batch)}; {_HINT}")


def call_model(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Call the model and find its logits: a tensor, `.logits`, ["logits"], or the first of a tuple.

    Raises:
        RelevanceError: The output holds no such tensor.
    """
    try:
        output = model(*args, **kwargs)
    except TypeError as error:
        came = ", ".join([*map(_describe, args), *(f"{key}={_describe(value)}" for key, value in kwargs.items())])
        raise RelevanceError(f"the model could not be called with {came}: {error}; {_HINT}") from error
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise RelevanceError(
            f"the model returned {_describe(output)}: expected a tensor of logits, an object with .logits, or a "
            "tuple that begins with them; otherwise define relevance_step on the LightningModule"
        )
    return logits


def explained_tensor(model: nn.Module, batch: Any, batch_idx: int, explain: Explain) -> tuple[Tensor, int]:
    """The tensor whose sum is explained, and the number of samples in the batch.

    `relevance_step(batch, batch_idx)` of the model goes first where there is one. Otherwise `explain` says which
    part of the logits counts: "logit" the true class (all true labels; the output itself in regression), "margin"
    that against the rest.

    Args:
        model: Called as `model(input)`.
        batch: See `split_batch`. Class indices of shape [N] or [N, d1, ...] go with logits [N, C, d1, ...].
        batch_idx: Handed to `relevance_step`.
        explain: Start relevance.

    Raises:
        RelevanceError: Batch, output or target are not understood.
    """
    own = getattr(model, "relevance_step", None)
    if callable(own):
        explained = own(batch, batch_idx)
        if not isinstance(explained, Tensor):
            raise RelevanceError(f"relevance_step returned {_describe(explained)}, expected a tensor to explain")
        return explained, _batch_size(batch, explained)
    args, kwargs, target = split_batch(batch)
    logits = call_model(model, args, kwargs)
    return _select(logits, target, explain), logits.shape[0] if logits.dim() else 1


def _select(logits: Tensor, target: Tensor, explain: Explain) -> Tensor:
    if logits.dim() == target.dim() + 1 and logits.shape[1] > 1 and not torch.is_floating_point(target):
        classes = logits.shape[1]
        valid = (target >= 0) & (target < classes)  # what CrossEntropyLoss ignores (-100) is not explained
        onehot = torch.nn.functional.one_hot(target.clamp(0, classes - 1).long(), classes).movedim(-1, 1).to(logits)
        onehot = onehot * valid.unsqueeze(1)
        start = onehot if explain == "logit" else onehot - logits.softmax(1) * valid.unsqueeze(1)
    elif logits.squeeze().shape == target.squeeze().shape:
        wanted = target.reshape(logits.shape).to(logits)
        if not bool(((wanted >= 0) & (wanted <= 1)).all()):
            start = torch.ones_like(logits) if explain == "logit" else wanted - logits
        elif logits.dim() > 1 and logits.shape[1] > 1 and torch.allclose(wanted.sum(1), wanted.new_ones(())):
            start = wanted if explain == "logit" else wanted - logits.softmax(1)
        else:
            start = wanted if explain == "logit" else wanted - logits.sigmoid()
    else:
        raise RelevanceError(
            f"logits of shape {tuple(logits.shape)} and a {target.dtype} target of shape {tuple(target.shape)} do not "
            "go together: expected class indices for logits [N, C, ...], or a target in the shape of the output. "
            f"{_HINT}"
        )
    return logits * start.detach()


def _batch_size(batch: Any, explained: Tensor) -> int:
    if isinstance(batch, Tensor) and batch.dim():
        return batch.shape[0]
    members = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    first = next((member for member in members if isinstance(member, Tensor) and member.dim()), None)
    if first is not None:
        return first.shape[0]
    return explained.shape[0] if explained.dim() else 1


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {sorted(map(str, value))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of ({', '.join(_describe(member) for member in list(value)[:4])})"
    return f"a {type(value).__name__}"
