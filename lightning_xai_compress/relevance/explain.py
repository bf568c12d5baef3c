"""What is explained: from a batch and a model to one number per sample whose relevance is passed back.

In the gradient domain (c = R / activation) the start is c = 1 at the explained tensor, so what is explained is fully
told by a tensor. The contrastive margin is the logits times minus the gradient of the loss that goes with them:
onehot - softmax for class indices and for class probabilities, target - sigmoid for labels in [0, 1] (one or several),
target - output for regression. Which of the last three it is, a target in the shape of the output tells by its values
alone; where that guess is wrong, a `relevance_step` says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_xai_compress.errors import RelevanceError

__all__ = [
    "EXPLAIN",
    "Explain",
    "Explained",
    "call_model",
    "check_explain",
    "explained_tensor",
    "input_tensors",
    "split_batch",
]

Explain = Literal["margin", "logit", "predicted"]
EXPLAIN: tuple[str, ...] = get_args(Explain)

_INPUT_KEYS = ("input", "inputs", "x", "image", "images", "features")
_TARGET_KEYS = ("target", "targets", "y", "label", "labels")
_IGNORED = 255  # what segmentation masks often hold at borders, where there are fewer classes
_HINT = (
    "expected (input, target, ...) or a mapping with one of the targets "
    f"{', '.join(map(repr, _TARGET_KEYS))} and one of the inputs {', '.join(map(repr, _INPUT_KEYS))} (or else all that "
    "forward takes, by name). Define relevance_step(self, batch, batch_idx) on the LightningModule and "
    "let it return the tensor to explain, for example (logits * (onehot - logits.softmax(1)).detach()).sum()"
)


class Explained(NamedTuple):
    """What is explained of a batch.

    Args:
        tensor: Its sum is explained.
        samples: Samples with anything explained.
        left_out: Explained logits <= 0, which were left out.
        batch_size: Samples in the batch.
    """

    tensor: Tensor
    samples: int
    left_out: int
    batch_size: int


def check_explain(explain: str) -> None:
    """Refuse what is no such choice.

    Raises:
        ValueError: With the choices.
    """
    if explain not in EXPLAIN:
        raise ValueError(f"explain must be 'margin', 'logit' or 'predicted', got {explain!r}")


def input_tensors(batch: Any) -> list[Tensor]:
    """The floating-point inputs in a batch, without its target where that is known."""
    try:
        args, kwargs, _ = split_batch(batch)
        found = [*args, *kwargs.values()]
    except RelevanceError:
        found = list(_members(batch))
    return [each for each in found if isinstance(each, Tensor) and each.is_floating_point()]


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
    single = " (batches must be a sequence of batches: pass [batch] for a single one)" * isinstance(batch, Tensor)
    raise RelevanceError(f"input and target of a batch were not found: got {_describe(batch)}{single}; {_HINT}")


def call_model(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Call the model and find its logits, see `find_logits`.

    Raises:
        RelevanceError: The output holds no such tensor.
    """
    try:
        output = model(*args, **kwargs)
    except TypeError as error:
        came = ", ".join([*map(_describe, args), *(f"{key}={_describe(value)}" for key, value in kwargs.items())])
        raise RelevanceError(f"the model could not be called with {came}: {error}; {_HINT}") from error
    return find_logits(output)


def find_logits(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, `.logits`, ["logits"], ["out"], or the first of a tuple.

    Raises:
        RelevanceError: It holds no such tensor.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits", output.get("out"))
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise RelevanceError(
            f"the model returned {_describe(output)}: expected a tensor of logits, an object with .logits, a mapping "
            "with 'logits' or 'out', or a tuple that begins with them; otherwise define relevance_step on the "
            "LightningModule"
        )
    return logits


def explained_tensor(model: nn.Module, batch: Any, batch_idx: int, explain: Explain) -> Explained:
    """The tensor whose sum is explained.

    `relevance_step(batch, batch_idx)` of the model goes first where there is one. Otherwise `explain` says which
    part of the logits counts: "logit" the true class (all true labels), "predicted" the class (each label, with
    probability above a half) that the model predicts, "margin" the true class against the rest. In regression, "logit"
    and "predicted" are the output itself. Logits <= 0 have no relevance to share (all signs would flip), so "logit" and
    "predicted" leave them out.

    Args:
        model: Called as `model(input)`.
        batch: See `split_batch`. Class indices of shape [N] or [N, d1, ...] go with logits [N, C, d1, ...] or
            [N, d1, ..., C]; negative ones, and 255, are not explained.
        batch_idx: Handed to `relevance_step`.
        explain: Start relevance.

    Raises:
        RelevanceError: No samples, or batch, output or target are not understood.
    """
    first = _first_tensor(batch)
    if first is not None and not len(first):
        raise RelevanceError(f"batch {batch_idx} holds no samples: its first tensor has shape {tuple(first.shape)}")
    own = getattr(model, "relevance_step", None)
    if callable(own):
        explained = own(batch, batch_idx)
        if not isinstance(explained, Tensor):
            raise RelevanceError(f"relevance_step returned {_describe(explained)}, expected a tensor to explain")
        size = len(first) if first is not None else explained.shape[0] if explained.dim() else 1
        return Explained(explained, size, 0, size)
    args, kwargs, target = split_batch(batch)
    logits = call_model(model, args, kwargs)
    return _select(logits, target, explain)


def _select(logits: Tensor, target: Tensor, explain: Explain) -> Explained:
    axis = None if torch.is_floating_point(target) else _class_axis(logits, target)
    if axis is not None:
        return _select_classes(logits, axis, target.long(), explain)
    if logits.squeeze().shape != target.squeeze().shape:
        raise RelevanceError(
            f"logits of shape {tuple(logits.shape)} and a {target.dtype} target of shape {tuple(target.shape)} do not "
            "go together: expected class indices for logits [N, C, ...] or [N, ..., C], or a target in the shape of "
            f"the output. {_HINT}"
        )
    wanted = target.reshape(logits.shape).to(logits)
    if not bool(((wanted >= 0) & (wanted <= 1)).all()):
        return _explained(logits, wanted - logits if explain == "margin" else torch.ones_like(logits))
    if logits.dim() > 1 and logits.shape[1] > 1 and torch.allclose(wanted.sum(1), wanted.new_ones(())):
        if explain == "predicted":
            wanted = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        return _explained(logits, wanted - logits.softmax(1)) if explain == "margin" else _positive(logits, wanted)
    if explain == "margin":
        return _explained(logits, wanted - logits.sigmoid())
    return _positive(logits, wanted if explain == "logit" else torch.ones_like(logits))


def _class_axis(logits: Tensor, target: Tensor) -> int | None:
    """The axis of the classes, where the target holds their indices."""
    for axis in (1, -1) if logits.dim() > 1 else (0,):
        if logits.dim() == target.dim() + 1 and logits.shape[axis] > 1:
            rest = list(logits.shape)
            del rest[axis]
            if rest == list(target.shape):
                return axis
    return None


def _select_classes(logits: Tensor, axis: int, target: Tensor, explain: Explain) -> Explained:
    if not axis:  # one sample without an axis of samples
        logits, axis, target = logits.unsqueeze(0), 1, target.unsqueeze(0)
    classes = logits.shape[axis]
    valid = target >= 0
    if classes <= _IGNORED:
        valid &= target != _IGNORED
    if bool((valid & (target >= classes)).any()):
        raise RelevanceError(
            f"the target holds class {int(target[valid].max())}, but the logits have {classes} classes: expected 0 to "
            f"{classes - 1}, or a negative one (or {_IGNORED}) for what is not to be explained"
        )
    chosen = logits.argmax(axis) if explain == "predicted" else torch.where(valid, target, 0)
    onehot = torch.nn.functional.one_hot(chosen, classes).movedim(-1, axis).to(logits) * valid.unsqueeze(axis)
    if explain != "margin":
        return _positive(logits, onehot)
    start = onehot - logits.softmax(axis) * valid.unsqueeze(axis)
    return Explained(logits * start.detach(), int(valid.view(len(valid), -1).any(1).sum()), 0, len(logits))


def _explained(logits: Tensor, start: Tensor) -> Explained:
    size = logits.shape[0] if logits.dim() else 1
    return Explained(logits * start.detach(), size, 0, size)


def _positive(logits: Tensor, wanted: Tensor) -> Explained:
    """The wanted logits that are > 0; where others are wanted, too, they are counted."""
    positive = logits.detach() > 0
    kept = wanted * positive
    samples = kept.flatten(1).any(1) if kept.dim() > 1 else kept != 0
    left_out = int(((wanted != 0) & ~positive).sum())
    return Explained(logits * kept, int(samples.sum()), left_out, logits.shape[0] if logits.dim() else 1)


def _members(batch: Any) -> Sequence[Any]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return list(batch.values())
    return batch if isinstance(batch, list | tuple) else ()


def _first_tensor(batch: Any) -> Tensor | None:
    return next((member for member in _members(batch) if isinstance(member, Tensor) and member.dim()), None)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {sorted(map(str, value))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of ({', '.join(_describe(member) for member in list(value)[:4])})"
    return f"a {type(value).__name__}"
