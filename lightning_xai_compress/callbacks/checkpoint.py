"""The plan of a compressed fit, rebuilt from one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask, Skipped, by_rows

__all__ = ["plan_of"]

_PARTS = ("keep", "bits", "scales")


def plan_of(checkpoint: Mapping[str, Any]) -> CompressionPlan:
    """Rebuild what was decided about a model from a Lightning checkpoint of its compressed fit.

    The weights in `checkpoint["state_dict"]` are the compressed ones: together they are what `save` takes.

    Args:
        checkpoint: As torch.load gives it.

    Raises:
        ArtifactError: It is no Lightning checkpoint, of a fit without compression, from before anything was pruned or
            quantized, or inconsistent.
    """
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ArtifactError(
            "expected a Lightning checkpoint with a 'state_dict', got "
            f"{sorted(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__}: give a "
            "file that ModelCheckpoint or trainer.save_checkpoint wrote"
        )
    state = _session(checkpoint)
    parts = {part: dict(state["latent"].get(part, {})) for part in _PARTS}
    if state.get("averaged"):  # averages of weights stand in the state_dict, on grids of their own
        parts["scales"] = dict(state["averaged"]["scales"])
    if not parts["keep"] and not parts["bits"]:
        raise ArtifactError(
            f"nothing was pruned or quantized yet when this checkpoint was saved ({_moment(checkpoint)}): give one of "
            "after the compression began, such as the last"
        )
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            _check(part, name, tensor, weights.get(name))
    rows = [{name: len(tensor) for name, tensor in parts[part].items()} for part in ("bits", "scales")]
    if rows[0] != rows[1]:
        raise ArtifactError(
            "the checkpoint is damaged: its bit widths and scales name different parameters, or rows; use another"
        )
    names = dict.fromkeys([*parts["keep"], *parts["bits"]])
    keep = {name: parts["keep"].get(name, torch.ones_like(weights[name], dtype=torch.bool)) for name in names}
    sizes = {name: weights[name].numel() // len(bits) for name, bits in parts["bits"].items()}
    allocation = BitAllocation(parts["bits"], sizes) if sizes else None
    skipped = tuple(Skipped(**entry) for entry in state.get("skipped", ()))
    made_of = dict(state.get("provenance") or {}), dict(state["latent"].get("codebooks", {}))
    return CompressionPlan(Mask(keep), allocation, parts["scales"], skipped, *made_of)


def _session(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """State of the callback that led the compression; the others of this package have none."""
    callbacks = checkpoint.get("callbacks")
    callbacks = callbacks if isinstance(callbacks, Mapping) else {}
    for state in callbacks.values():
        if isinstance(state, Mapping) and isinstance(state.get("latent"), Mapping):
            return state
    found = ", ".join(sorted(str(name).partition("{")[0] for name in callbacks))  # settings follow the brace
    raise ArtifactError(
        f"the checkpoint is of a fit without compression: expected the state of XAICompression, or of its stages, "
        f"among its callbacks, got {found or 'none'}; give a full checkpoint (not "
        "save_weights_only=True) of a fit with XAICompression in Trainer(callbacks=[...])"
    )


def _check(part: str, name: str, tensor: Tensor, weight: object) -> None:
    if not isinstance(weight, Tensor):
        raise ArtifactError(
            f"the checkpoint compressed {name}, but its state_dict lacks it: it is of two models; use another"
        )
    fits = tensor.shape == weight.shape if part == "keep" else _has_rows(weight, tensor.shape)
    if not fits:
        wanted = f"{tuple(weight.shape)}" if part == "keep" else f"one number a row of {tuple(weight.shape)}"
        raise ArtifactError(
            f"the checkpoint is damaged: {part} of {name} has shape {tuple(tensor.shape)}, expected {wanted}; "
            "use another"
        )


def _has_rows(weight: Tensor, shape: torch.Size) -> bool:
    try:
        return len(shape) == 1 and len(by_rows(weight, shape[0])) == shape[0]
    except ValueError:
        return False


def _moment(checkpoint: Mapping[str, Any]) -> str:
    return f"epoch {checkpoint.get('epoch', '?')}, step {checkpoint.get('global_step', '?')}"
