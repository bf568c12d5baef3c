"""The one owner of the latent weights during a fit.

A parameter always holds its compressed value: masked, and once quantization has begun on its grid. What trains is
what validates, checkpoints and exports, and the model's keys never change. Only around an optimizer step does it hold
the float latent: copied in just before the step, and compressed again just after it. With gradients taken at the
compressed value this is the straight-through estimator.

Two states, latent and compressed, are explicit per parameter, so that a step that was skipped (a gradient scaler that
found inf) or taken behind the callback's back is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_xai_compress.errors import LatentCopyError
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask, Skipped
from lightning_xai_compress.pruning import PackedMasks
from lightning_xai_compress.quantization import (
    mask_,
    nearest_codes,
    quantize,
    refit_codebook,
    refit_scales,
    requantize_,
)

__all__ = ["LatentCopy"]

_REFIT = 8  # steps; scales move slowly, and fitting them takes as long as all else that is done after a step


class LatentCopy:
    """Keeps masks, bit widths, scales and latents of the compressible parameters, and keeps the parameters to them.

    Args:
        parameters: The compressible parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.keep = PackedMasks(self.parameters)
        self.bits: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.codebooks: dict[str, Tensor] = {}  # of layers that share values
        self._importance: dict[str, Tensor] = {}  # of their weights
        self._latents: dict[str, Tensor] = {}
        self._ages: dict[str, int] = {}  # steps since the scales were fitted
        self._live: set[str] = set()
        self._steps: list[Optimizer] = []  # under way; one that wraps another has both
        self._evaluations = 0
        self._name = {id(parameter): name for name, parameter in self.parameters.items()}
        self._hooks: list[RemovableHandle] = []
        self._active: Callable[[], bool] = lambda: True

    # --- around an optimizer step

    def attach(self, optimizers: Iterable[Optimizer], *, active: Callable[[], bool] = lambda: True) -> None:
        """Watch the steps of all optimizers: of these, of those that come later, and of those that nobody knows.

        Args:
            optimizers: Those of the fit.
            active: Steps taken while this is False are let through unseen: trials, after which the weights are put
                back to what they were.

        Raises:
            LatentCopyError: LBFGS, which evaluates several points a step, or no `torch.optim.Optimizer`.
        """
        for optimizer in optimizers:
            if isinstance(optimizer, LBFGS):
                raise _several_evaluations(optimizer)
            if not isinstance(optimizer, Optimizer):
                raise LatentCopyError(
                    f"{type(optimizer).__name__} is no torch.optim.Optimizer, so its steps cannot be watched: derive "
                    "it from that class"
                )
        self._active = active
        self._hooks += [
            register_optimizer_step_pre_hook(self._step_begins),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Leave the parameters compressed, with all tensors beside them, and stop watching; may be called twice."""
        self.settle()
        self._follow()
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Take pruned weights out of all gradients, for what looks at them before the step: clipping by hand."""
        for name, keep in self.keep.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                mask_(gradient, keep)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Take pruned weights out of the gradients, and let the optimizer see the latents.

        Raises:
            LatentCopyError: It has evaluated the loss before within the same step.
        """
        if self._steps:
            self._evaluations += 1
            if self._evaluations > 1:
                raise _several_evaluations(self._steps[0])
        for name in self._of(optimizer):
            parameter = self.parameters[name]
            if parameter.grad is not None and name in self.keep:
                mask_(parameter.grad, self.keep[name])  # inf * 0 would be NaN
            if name not in self._live and name in self._latents:
                parameter.copy_(self._latents[name])
            self._live.add(name)

    def _step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._active() and self._of(optimizer):
            if not self._steps:
                self._evaluations = 0
            self._steps.append(optimizer)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._active():
            return
        if optimizer in self._steps:
            del self._steps[self._steps.index(optimizer) :]
        if self._steps:  # one within another, which may go on to change the weights
            return
        for name in self._of(optimizer):
            if name not in self._live:
                raise LatentCopyError(
                    f"{type(optimizer).__name__} stepped on {name} without Lightning's on_before_optimizer_step hook, "
                    "so the step started from the compressed value. In manual optimization call "
                    "self.optimizers().step(), not self.optimizers(use_pl_optimizer=False), nor an optimizer that "
                    "configure_optimizers does not return"
                )
            self._ages[name] = (self._ages.get(name, 0) + 1) % _REFIT
            self._take_up(name, refit=self._ages[name] == 0)
            self._live.discard(name)

    @torch.no_grad()
    def settle(self) -> None:
        """Compress again what was opened for a step that never came."""
        for name in self._live & self._latents.keys():
            self._compress(name)
        self._live.clear()
        self._steps.clear()

    def _follow(self) -> None:
        """Bring all tensors to where the parameters are now: Lightning moves a module from the GPU after a fit."""
        for tensors in (self.bits, self.scales, self.codebooks, self._importance, self._latents):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(self.parameters[name].device)
        self.keep.follow()

    def _take_up(self, name: str, *, refit: bool) -> None:
        """What the parameter holds, masked, is the new latent; the parameter goes back to its grid."""
        parameter, keep = self.parameters[name], self.keep.get(name)
        if name in self.codebooks:
            self._share(name, refit=refit)
        elif name in self._latents:
            bits, scale = self.bits[name], self.scales[name]
            self.scales[name] = requantize_(parameter, self._latents[name], bits, scale, keep=keep, refit=refit)
        elif keep is not None:
            mask_(parameter, keep)

    def _share(self, name: str, *, refit: bool) -> None:
        """The same for a layer that shares values: each weight takes the nearest, and these move to their means."""
        parameter, latent = self.parameters[name], self._latents[name]
        if name in self.keep:
            mask_(parameter, self.keep[name])
        latent.copy_(parameter)
        if refit:
            codebook = self.codebooks[name]
            codes = nearest_codes(latent, codebook)
            self.codebooks[name] = refit_codebook(latent, codes, codebook, self._importance.get(name))
        self._compress(name)

    def _on_grid(self, name: str) -> Tensor:
        """What the parameter should hold by its latent."""
        return quantize(self._latents[name], self.bits[name], self.scales[name], self.codebooks.get(name))

    def _compress(self, name: str) -> None:
        self.parameters[name].copy_(self._on_grid(name))

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
            self.keep[name] = keep
            for tensor in (self.parameters[name], self._latents.get(name)):
                if tensor is not None:
                    mask_(tensor, self.keep[name])

    @torch.no_grad()
    def apply_bits(
        self,
        allocation: BitAllocation,
        scales: Mapping[str, Tensor],
        codebooks: Mapping[str, Tensor] | None = None,
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put the weights onto their grids, from now on; their present values become the latents.

        Args:
            allocation, scales, codebooks: See `CompressionPlan`.
            importance: By which means of shared values are weighted, in the shapes of the weights.
        """
        self.settle()
        self.codebooks = dict(codebooks or {})
        self._importance = {name: each for name, each in (importance or {}).items() if name in self.codebooks}
        for name in allocation.bits:
            self.bits[name] = allocation[name]
            self.scales[name] = scales[name]
            self._ages[name] = 0
            self._latents.setdefault(name, self.parameters[name].detach().clone())
            self._compress(name)

    # --- values that came from elsewhere

    @torch.no_grad()
    def adopt(self) -> bool:
        """Take up what someone else wrote into the parameters, such as an average of weights: masked, and on the grid.

        Returns:
            Whether there was anything.
        """
        self.settle()
        self._follow()
        found = False
        for name, parameter, kept in self._kept():
            if not torch.equal(parameter, kept):
                self._take_up(name, refit=True)
                found = True
        return found

    @torch.no_grad()
    def restore(self) -> bool:
        """Undo what someone else wrote into the parameters since the last step, as far as masks and grids tell.

        Returns:
            Whether there was anything.
        """
        found = False
        for _, parameter, kept in self._kept():
            if not torch.equal(parameter, kept):
                parameter.copy_(kept)
                found = True
        return found

    @torch.no_grad()
    def holds(self) -> bool:
        """Whether the parameters are as the last step, or the end of the fit, left them."""
        return all(torch.equal(parameter, kept) for _, parameter, kept in self._kept())

    def _kept(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Changed parameters with what they should hold, as far as masks and grids tell."""
        for name, parameter in self.parameters.items():
            if name in self._latents:
                kept = self._on_grid(name)
            elif name in self.keep:
                kept = parameter.masked_fill(~self.keep[name].to(parameter.device), 0.0)
            else:
                continue
            yield name, parameter, kept.to(parameter.device)

    @torch.no_grad()
    def projected(self, name: str, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `adopt` would make of values for a parameter, and the scales of their grid; None without a grid."""
        device = self.parameters[name].device
        values = values.detach().to(device)
        if name in self.keep:
            values = values.masked_fill(~self.keep[name], 0.0)
        if name not in self.bits:
            return values.clone(), None
        bits = self.bits[name].to(device)
        if name in self.codebooks:
            return quantize(values, bits, self.scales[name], self.codebooks[name].to(device)), self.scales[name]
        scales = refit_scales(values, bits, self.scales[name].to(device))
        return quantize(values, bits, scales), scales

    # --- what came of it

    @property
    def changed(self) -> bool:
        """Whether anything was pruned or quantized."""
        return bool(self.keep or self.bits)

    @property
    def quantized(self) -> bool:
        """Whether weights are on grids."""
        return bool(self.bits)

    def values(self) -> dict[str, Tensor]:
        """Float values of all compressible parameters: the latents of those that are on a grid."""
        return {name: self._latents.get(name, parameter).detach() for name, parameter in self.parameters.items()}

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
        own = {"keep": self.keep, "bits": self.bits, "scales": self.scales, "codebooks": self.codebooks}
        state = state or own
        keep = {
            name: state["keep"].get(name, torch.ones_like(parameter, dtype=torch.bool))
            for name, parameter in self.parameters.items()
        }
        sizes = {name: self.parameters[name].numel() // len(bits) for name, bits in state["bits"].items()}
        allocation = BitAllocation(dict(state["bits"]), sizes) if sizes else None
        made_of = dict(provenance or {}), dict(state.get("codebooks", {}))
        return CompressionPlan(Mask(keep), allocation, dict(state["scales"]), skipped, *made_of)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors only, keyed by parameter name."""
        return {
            "keep": dict(self.keep),
            "bits": dict(self.bits),
            "scales": dict(self.scales),
            "codebooks": dict(self.codebooks),
            "importance": dict(self._importance),
            "latents": dict(self._latents),
            "ages": {name: torch.tensor(self._ages.get(name, 0)) for name in self._latents},
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from a state; the parameters must hold the compressed values of the same checkpoint.

        Raises:
            LatentCopyError: The state is of another model.
        """
        for kind, part in state.items():
            for name, tensor in part.items():
                if name not in self.parameters:
                    raise LatentCopyError(f"the checkpoint compressed {name}, which is not among this fit's layers")
                if kind != "codebooks" and tensor.dim() > 1 and tensor.shape != self.parameters[name].shape:
                    raise LatentCopyError(
                        f"the checkpoint holds {name} of shape {tuple(tensor.shape)}, the model "
                        f"{tuple(self.parameters[name].shape)}"
                    )
        placed = {
            part: {name: tensor.to(self.parameters[name].device).clone() for name, tensor in tensors.items()}
            for part, tensors in state.items()
        }
        self.keep = PackedMasks(self.parameters)
        self.keep.update(placed["keep"])
        self.bits, self.scales = placed["bits"], placed["scales"]
        self.codebooks, self._importance = placed.get("codebooks", {}), placed.get("importance", {})
        self._latents = placed["latents"]
        self._ages = {name: int(age) for name, age in placed["ages"].items()}


def _several_evaluations(optimizer: Optimizer) -> LatentCopyError:
    return LatentCopyError(
        f"{type(optimizer).__name__} evaluates the loss several times within a step, so pruned and quantized weights "
        "cannot be kept to their values: use a first-order optimizer such as SGD or AdamW"
    )
