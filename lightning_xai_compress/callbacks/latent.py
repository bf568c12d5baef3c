"""The one owner of the latent weights during a fit.

A parameter always holds its compressed value: masked, and once quantization has begun on its grid. What trains is
what validates, checkpoints and exports, and the model's keys never change. Only around an optimizer step does it hold
the float latent: copied in just before the step, and compressed again just after it. With gradients taken at the
compressed value this is the straight-through estimator.

Two states, latent and compressed, are explicit per parameter, so that a step that was skipped (a gradient scaler that
found inf) or taken behind the callback's back is noticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_xai_compress.errors import LatentCopyError
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask, Skipped
from lightning_xai_compress.quantization import quantize, refit_scales

__all__ = ["LatentCopy"]


class LatentCopy:
    """Keeps masks, bit widths, scales and latents of the compressible parameters, and keeps the parameters to them.

    Args:
        parameters: The compressible parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.keep: dict[str, Tensor] = {}
        self.bits: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self._latents: dict[str, Tensor] = {}
        self._live: set[str] = set()
        self._name = {id(parameter): name for name, parameter in self.parameters.items()}
        self._hooks: list[RemovableHandle] = []

    # --- around an optimizer step

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Watch the optimizers' steps.

        Raises:
            LatentCopyError: LBFGS, which evaluates several points a step.
        """
        for optimizer in optimizers:
            if isinstance(optimizer, LBFGS):
                raise LatentCopyError(
                    "LBFGS evaluates the loss several times within a step, so pruned and quantized weights cannot be "
                    "kept to their values: use a first-order optimizer such as SGD or AdamW"
                )
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def detach(self) -> None:
        """Leave the parameters compressed and stop watching; may be called twice."""
        self.settle()
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Take pruned weights out of the gradients, and let the optimizer see the latents."""
        for name in self._of(optimizer):
            parameter = self.parameters[name]
            if parameter.grad is not None and name in self.keep:
                parameter.grad.masked_fill_(~self.keep[name], 0.0)  # inf * 0 would be NaN
            if name not in self._live and name in self._latents:
                parameter.copy_(self._latents[name])
            self._live.add(name)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for name in self._of(optimizer):
            if name not in self._live:
                raise LatentCopyError(
                    f"{type(optimizer).__name__} stepped on {name} without Lightning's on_before_optimizer_step hook, "
                    "so the step started from the compressed value. In manual optimization call "
                    "self.optimizers().step() (not self.optimizers(use_pl_optimizer=False)), and step once per "
                    "training batch and optimizer"
                )
            parameter = self.parameters[name]
            if name in self.keep:
                parameter.masked_fill_(~self.keep[name], 0.0)
            if name in self._latents:
                self._latents[name].copy_(parameter)
                self.scales[name] = refit_scales(parameter, self.bits[name], self.scales[name])
                self._compress(name)
            self._live.discard(name)

    @torch.no_grad()
    def settle(self) -> None:
        """Compress again what was opened for a step that never came."""
        for name in self._live & self._latents.keys():
            self._compress(name)
        self._live.clear()

    def _compress(self, name: str) -> None:
        self.parameters[name].copy_(quantize(self._latents[name], self.bits[name], self.scales[name]))

    def _of(self, optimizer: Optimizer) -> list[str]:
        return [
            self._name[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._name
        ]

    # --- decisions of the stages

    @torch.no_grad()
    def apply_mask(self, mask: Mask) -> None:
        """Set what is pruned to zero, from now on."""
        for name, keep in mask.keep.items():
            self.keep[name] = keep.to(self.parameters[name].device)
            self.parameters[name].masked_fill_(~self.keep[name], 0.0)
            if name in self._latents:
                self._latents[name].masked_fill_(~self.keep[name], 0.0)

    @torch.no_grad()
    def apply_bits(self, allocation: BitAllocation, scales: Mapping[str, Tensor]) -> None:
        """Put the weights onto their grids, from now on; their present values become the latents."""
        self.settle()
        for name in allocation.bits:
            self.bits[name] = allocation[name]
            self.scales[name] = scales[name]
            self._latents.setdefault(name, self.parameters[name].detach().clone())
            self._compress(name)

    # --- what came of it

    @property
    def quantized(self) -> bool:
        """Whether weights are on grids."""
        return bool(self.bits)

    def mask(self) -> Mask:
        """The present mask over all compressible parameters."""
        return self.plan().mask

    def plan(
        self,
        skipped: tuple[Skipped, ...] = (),
        *,
        state: Mapping[str, Mapping[str, Tensor]] | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> CompressionPlan:
        """All that was decided so far.

        Args:
            skipped: What was left alone.
            state: What was decided when `state_dict` gave this; the present where None.
            provenance: For the files.
        """
        state = state or {"keep": self.keep, "bits": self.bits, "scales": self.scales}
        keep = {
            name: state["keep"].get(name, torch.ones_like(parameter, dtype=torch.bool))
            for name, parameter in self.parameters.items()
        }
        sizes = {name: self.parameters[name][0].numel() for name in state["bits"]}
        allocation = BitAllocation(dict(state["bits"]), sizes) if sizes else None
        return CompressionPlan(Mask(keep), allocation, dict(state["scales"]), skipped, dict(provenance or {}))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors only, keyed by parameter name."""
        return {
            "keep": dict(self.keep),
            "bits": dict(self.bits),
            "scales": dict(self.scales),
            "latents": dict(self._latents),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from a state; the parameters must hold the compressed values of the same checkpoint.

        Raises:
            LatentCopyError: The state is of another model.
        """
        for part in state.values():
            for name, tensor in part.items():
                if name not in self.parameters:
                    raise LatentCopyError(f"the checkpoint compressed {name}, which is not among this fit's layers")
                if tensor.dim() > 1 and tensor.shape != self.parameters[name].shape:
                    raise LatentCopyError(
                        f"the checkpoint holds {name} of shape {tuple(tensor.shape)}, the model "
                        f"{tuple(self.parameters[name].shape)}"
                    )
        placed = {
            part: {name: tensor.to(self.parameters[name].device).clone() for name, tensor in tensors.items()}
            for part, tensors in state.items()
        }
        self.keep, self.bits, self.scales = placed["keep"], placed["bits"], placed["scales"]
        self._latents = placed["latents"]
