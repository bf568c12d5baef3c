"""The best compressed state of a fit, kept for the export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_xai_compress.report import Mode

__all__ = ["Best", "Mode", "best_of", "fill"]


class Best:
    """Keeps a copy of the model, on the CPU, from when it was best.

    Args:
        mode: Whether the largest or the smallest value is best.
        metric: What is measured.
    """

    def __init__(self, mode: Mode, metric: str = "") -> None:
        self.mode = mode
        self.of = f"{mode} {metric}".strip()
        self.value: float | None = None
        self.epoch = 0.0
        self.bytes = 0  # of its packed file, where somebody weighs it
        self.weights: dict[str, Tensor] = {}
        self.latent: dict[str, dict[str, Tensor]] = {}

    def beaten_by(self, value: float) -> bool:
        """Whether a value is better; NaN never is, and the earlier of equals stays."""
        if self.value is None:
            return value == value
        return value > self.value if self.mode == "max" else value < self.value

    def keep(self, value: float, epoch: float, model: nn.Module, latent: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the weights, and the masks, widths and scales that go with them."""
        self.value, self.epoch = value, epoch
        self.weights = {name: _copy(tensor) for name, tensor in _tensors(model).items()}
        self.latent = {part: {name: _copy(tensor) for name, tensor in latent[part].items()} for part in latent}

    @contextmanager
    @torch.no_grad()
    def loaded(self, model: nn.Module) -> Iterator[None]:
        """The model holds the best weights inside, and its own again afterwards."""
        own = {name: tensor.clone() for name, tensor in _tensors(model).items()}
        try:
            fill(model, self.weights)
            yield
        finally:
            fill(model, own)

    def state(self) -> dict[str, Any]:
        """Tensors and plain types."""
        plain = {"of": self.of, "value": self.value, "epoch": self.epoch, "bytes": self.bytes}
        return {**plain, "weights": self.weights, "latent": self.latent}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up or begin; what was best by another measure is no start."""
        if state and state.get("of") != self.of:
            rank_zero_warn(f"export='best' begins anew: the checkpoint's best was by {state.get('of')}, not {self.of}")
            state = {}
        self.value, self.epoch = state.get("value"), state.get("epoch", 0.0)
        self.weights, self.latent = dict(state.get("weights", {})), dict(state.get("latent", {}))
        self.bytes = state.get("bytes", 0)


def best_of(export: str, mode: Mode | None, metric: Metric | str | None) -> Best | None:
    """Keeps the best state, where it is to be exported.

    Raises:
        ValueError: No such choice, or nothing that tells what is best.
    """
    if export not in ("last", "best"):
        raise ValueError(f"export must be 'last' or 'best', got {export!r}")
    if export == "last":
        return None
    if metric is None:
        raise ValueError("export='best' needs metric=: what best means")
    if mode is None:
        raise ValueError(f"export='best' needs mode='max' or 'min': {metric!r} does not tell which is better")
    return Best(mode, metric if isinstance(metric, str) else type(metric).__name__)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a state dict holds, as the model's own tensors."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


@torch.no_grad()
def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers other values."""
    for name, tensor in _tensors(model).items():
        tensor.copy_(values[name])


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
