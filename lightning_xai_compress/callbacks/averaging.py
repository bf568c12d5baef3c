"""Weight averages beside compression: what is averaged stays an average, what is shown is masked and on the grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_xai_compress.callbacks.latent import LatentCopy

__all__ = ["Averaging", "ordered"]

_SWAPPING = "WeightAveraging"  # and its children, such as EMAWeightAveraging
_TRANSFERRING = "StochasticWeightAveraging"


def ordered(callbacks: list[Callback], ours: type[Callback]) -> list[Callback]:
    """Callbacks in an order that makes that of the user's list irrelevant.

    Those that average weights come before ours: at the end of the fit they write the average into the module, and only
    then can it be exported. EarlyStopping comes after, as Lightning itself does with ModelCheckpoint: it may read
    the metric that we publish.

    Raises:
        ValueError: Two callbacks that swap averages in.
    """
    averaging = [each for each in callbacks if _is(each, _SWAPPING) or _is(each, _TRANSFERRING)]
    swapping = [type(each).__name__ for each in averaging if _is(each, _SWAPPING)]
    if len(swapping) > 1:
        raise ValueError(f"{' and '.join(swapping)} would average each other's weights: keep one")
    places = [index for index, each in enumerate(callbacks) if isinstance(each, ours)]
    before = [each for each in averaging if callbacks.index(each) > places[0]]
    after = [each for each in callbacks[: places[-1]] if _is(each, "EarlyStopping")]
    moved = [*before, *after]
    return [
        *(each for each in callbacks[: places[0]] if each not in moved),
        *before,
        *(each for each in callbacks[places[0] : places[-1] + 1] if each not in moved),
        *after,
        *(each for each in callbacks[places[-1] + 1 :] if each not in moved),
    ]


class Averaging:
    """The average that Lightning's WeightAveraging swaps in for validation and checkpoints; without it, nothing.

    The average of compressed weights has values off the grid and, for a while, where weights were pruned. It goes on
    averaging with them. Where it is seen, a copy with masks and grids takes its place.

    Args:
        trainer: In fit.
        module: The user's module.
        latent: Of the same module.
        norms: Names of BatchNorm buffers, which are estimated anew for what is shown.
    """

    def __init__(self, trainer: Trainer, module: nn.Module, latent: LatentCopy, norms: Iterable[str]) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = [each for each in callbacks if _is(each, _SWAPPING)]
        self._average: Any = found[0]._average_model if found else None  # type: ignore[attr-defined]
        self._latent = latent
        self._module = module
        self._names = [*latent.parameters, *norms]
        self._norms = list(norms)
        self._raw: dict[str, Tensor] = {}
        self._shown: dict[str, Tensor] = {}
        self._shown_buffers: dict[str, Tensor] = {}
        self._shown_at = -1
        self._trainer = trainer
        self._hooks: list[RemovableHandle] = []
        if self._average is not None:
            self._hooks.append(self._average.register_state_dict_post_hook(partial(self._in_checkpoint)))

    @property
    def present(self) -> bool:
        """Whether validation sees an average."""
        return self._average is not None

    @torch.no_grad()
    def show(self, refresh: Callable[[], None]) -> None:
        """Put masks and grids onto the average that has just been swapped into the module.

        Args:
            refresh: Estimates BatchNorm anew.
        """
        tensors = _tensors(self._module)
        self._raw = {name: tensors[name].detach().clone() for name in self._names}
        self._shown = {}
        for name, parameter in self._latent.parameters.items():
            values, scale = self._latent.projected(name, parameter)
            parameter.copy_(values)
            if scale is not None:
                self._shown[name] = scale
        if self._latent.changed:
            refresh()
        tensors = _tensors(self._module)
        self._shown_buffers = {name: tensors[name].detach().clone() for name in self._norms}
        self._shown_at = self._trainer.global_step

    @contextmanager
    def shown(self) -> Iterator[None]:
        """After the validation: the module holds once more what was validated; then the average is raw again."""
        if not self._raw:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()
            average = _tensors(self._average.module)
            with torch.no_grad():
                for name, tensor in self._raw.items():
                    average[name].copy_(tensor)
            self._raw = {}

    def latent_state(self) -> dict[str, dict[str, Tensor]]:
        """Like that of the latent copy, for what the module holds now."""
        state = self._latent.state_dict()
        if self._raw:
            state["scales"] = dict(self._shown)
            state["latents"] = {name: self._raw[name] for name in state["latents"]}
        return state

    def transfer(self) -> None:
        """The end of training, for averages that have not seen it since the fit was over when it was resumed."""
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        for each in callbacks:
            # one with an epoch for BatchNorm has written its average at the start of that epoch
            if _is(each, _SWAPPING) or (_is(each, _TRANSFERRING) and not each._model_contains_batch_norm):  # type: ignore[attr-defined]
                each.on_train_end(self._trainer, self._module)  # type: ignore[arg-type]

    @torch.no_grad()
    def seal(self) -> None:
        """The average is what the module holds at the end: later checkpoints are made of it."""
        self._shown_at = -1
        if self.present:
            average = _tensors(self._average.module)
            for name, tensor in _tensors(self._module).items():
                average[name].copy_(tensor)

    def close(self) -> None:
        """Another fit begins: checkpoints of the averaging callback are its own again; may be called twice."""
        while self._hooks:
            self._hooks.pop().remove()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The raw average and the scales of what stands for it in the checkpoint; empty without one."""
        if not self.present or not self._latent.changed:
            return {}
        average = _tensors(self._average.module)
        raw = {name: average[name].detach().clone() for name in self._names}
        scales = {}
        for name in self._latent.bits:
            _, scale = self._latent.projected(name, raw[name])
            if scale is not None:
                scales[name] = scale
        return {"raw": raw, "scales": scales}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give the averaging callback its raw average back; without one, go on from the average that was loaded."""
        if not state:
            return
        if self.present:
            average = _tensors(self._average.module)
            for name, tensor in state["raw"].items():
                average[name].copy_(tensor)

    def _swap(self) -> None:
        average = _tensors(self._average.module)
        with torch.no_grad():
            for name, tensor in _tensors(self._module).items():
                kept = average[name].clone()
                average[name].copy_(tensor)
                tensor.copy_(kept)

    def _in_checkpoint(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """What a checkpoint holds of the average: masks, grids, and the BatchNorm statistics that were validated."""
        if not self._latent.changed:
            return
        names = {id(parameter): name for name, parameter in self._average.module.named_parameters()}
        for alias, parameter in self._average.module.named_parameters(remove_duplicate=False):  # tied weights have two
            name = names[id(parameter)]
            if name in self._latent.parameters:
                key = f"{prefix}module.{alias}"
                state[key] = self._latent.projected(name, state[key])[0]
        if self._shown_at == self._trainer.global_step:
            for name, buffer in self._shown_buffers.items():
                state[f"{prefix}module.{name}"] = buffer


def _is(callback: Callback, kind: str) -> bool:
    """By name, since there are two namespaces of Lightning."""
    return any(each.__name__ == kind for each in type(callback).__mro__)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
