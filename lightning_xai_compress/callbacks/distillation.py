"""The stage that lets the dense model teach the compressed one, without a change to `training_step`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.precision import MixedPrecision
from lightning_xai_compress.callbacks.pruning import RelevancePruning
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Stage
from lightning_xai_compress.checks import check_number
from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.relevance import evaluation, find_logits

__all__ = ["DenseTeacher", "Distillation"]


@dataclass(frozen=True)
class Distillation:
    """How much the dense model teaches.

    Args:
        weight: Share of the teacher in the loss, in (0, 1]; the loss of `training_step` has the rest.
        temperature: Both outputs are softened by it, > 0.
        module: Name of the submodule whose output are the logits, where that is neither the LightningModule nor the
            one child that `training_step` calls; "" for the LightningModule.
        class_axis: Axis of the logits that counts classes.
    """

    weight: float = 0.7
    temperature: float = 3.0
    module: str | None = None
    class_axis: int = 1

    def __post_init__(self) -> None:
        check_number("weight", self.weight)
        check_number("temperature", self.temperature)
        check_number("class_axis", self.class_axis, whole=True)
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight must lie in (0, 1] (share of the teacher in the loss), got {self.weight}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.module is not None and not isinstance(self.module, str):
            raise ValueError(f"module must be the name of a submodule, got {self.module!r}")


class DenseTeacher(CompressionCallback, Stage):
    """Distillation (Hinton, Vinyals & Dean 2015, arXiv 1503.02531) from the dense model.

    When compression begins, the weights are copied. From then on that copy sees, in evaluation mode, every input of
    the training, and the gradient at the logits z of n predictions becomes (1 - w) g + w T (softmax(z / T) -
    softmax(t / T)) / n: that of (1 - w) loss + w T^2 KL(softmax(t / T) || softmax(z / T)), with t the teacher's
    logits, w its weight and T the temperature. What `training_step` returns and logs stays as it is, its own loss.
    Logits of one class go by the logistic function instead. All predictions count, also those that a loss leaves out.

    To be used beside the stages that compress. The first batch of a fit shows which module gives the logits, and is not
    taught unless that is named. Costs a forward pass a batch and the memory of the dense weights, which checkpoints
    hold, too.

    Raises:
        ValueError: (in fit) no such submodule, or no stage compresses.
        RelevanceError: (after the first batch) what gives the logits was not found, or there are several.
    """

    rank: ClassVar[int] = 5

    def __init__(self, distillation: Distillation | None = None) -> None:
        super().__init__()
        if distillation is not None and not isinstance(distillation, Distillation):
            raise ValueError(f"distillation must be a Distillation(...), got {distillation!r}")
        self.distillation = distillation or Distillation()
        self._weights: dict[str, Tensor] = {}  # of the teacher: parameters and buffers
        self._handles: list[RemovableHandle] = []
        self._live = False  # within a training step
        self._depth = 0  # of children that are called within one another
        self._watched: tuple[str, ...] = ()
        self._found: set[str] = set()  # of these, which gave logits in the first batch
        self._target = self.distillation.module
        self._fit: Session | None = None  # whichever callback leads it

    def __getstate__(self) -> dict[str, Any]:
        """Without the fit that was, as in the base."""
        return {**super().__getstate__(), "_fit": None, "_handles": []}

    def stages(self) -> list[Stage]:
        """This one."""
        return [self]

    def begin(self, session: Session) -> None:
        """Watch the module that gives the logits."""
        if not any(isinstance(stage, RelevancePruning | MixedPrecision) for stage in session.stages):
            raise ValueError(
                "DenseTeacher needs RelevancePruning or MixedPrecision in the same Trainer: the dense model teaches "
                "the compressed one. Add them, or use XAICompression(distillation=Distillation())"
            )
        self._fit, name = session, self.distillation.module
        if name is None:
            watched = {"": session.module, **dict(session.module.named_children())}
        else:
            try:
                watched = {name: session.module.get_submodule(name)}
            except AttributeError as error:
                raise ValueError(
                    f"Distillation(module={name!r}): there is no such module in {type(session.module).__name__}; it "
                    f"has {', '.join(child for child, _ in session.module.named_children()) or 'no children'}"
                ) from error
        self._watched = tuple(watched)
        self._found.clear()
        for at, module in watched.items():
            if at:  # in ddp the LightningModule is called for training_step as well
                self._handles.append(module.register_forward_pre_hook(self._enter))
            hook = functools.partial(self._called, at)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        moved = _Copies(session.module.device)
        self._weights = {name: moved[value] for name, value in self._weights.items()}

    def before_compression(self, session: Session, batch: int) -> None:
        """Copy the dense model."""
        if not self._weights:
            module, copies = session.module, _Copies()
            # under all their names: a submodule that is taught may know them by another one
            for named in (module.named_parameters, module.named_buffers):
                self._weights |= {name: copies[value] for name, value in named(remove_duplicate=False)}

    def advance(self, session: Session, batch: int) -> None:
        """What the model is called with from now on is training."""
        self._live, self._depth = True, 0

    def after_batch(self, session: Session) -> None:
        """It no longer is."""
        self._live = False
        if self._target is not None:
            return
        found = {""} if "" in self._found else self._found  # the module calls its children
        if len(found) != 1:
            came = f"logits came from {sorted(self._found)}" if self._found else "none gave a tensor of logits"
            raise RelevanceError(
                f"the dense model cannot teach: of {sorted(self._watched)}, which training_step may call ('' is the "
                f"LightningModule), {came}: name the one whose output are the logits, as Distillation(module=...)"
            )
        self._target = next(iter(found))

    # --- during a training step

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._depth += self._live

    def _called(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A watched module has been called: in the first batch look at what it gives, then teach."""
        if not self._live:
            return
        self._depth -= bool(name)
        if (name and self._depth) or not torch.is_grad_enabled() or self._target not in (None, name):
            return
        logits = self._logits(output)
        if logits is None:
            return
        self._found.add(name)
        if self._target is not None and self._weights:
            taught = find_logits(self._teach(name, module, args, kwargs))
            logits.register_hook(self._pull(logits.detach(), taught))

    def _logits(self, output: Any) -> Tensor | None:
        """Of a call; None where it is something else: a loss, a metric, features that are not trained."""
        try:
            logits = find_logits(output)
        except RelevanceError:
            if self.distillation.module is not None:
                raise
            return None
        axis = self.distillation.class_axis
        return logits if logits.requires_grad and -logits.dim() <= axis < logits.dim() else None

    def _teach(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The teacher's output."""
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): value for key, value in self._weights.items() if key.startswith(prefix)}
        with self._aside(), evaluation(module), torch.no_grad():
            return functional_call(module, own, args, dict(kwargs))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The training notices nothing."""
        assert self._fit is not None
        self._live = False
        try:
            with isolate_rng(), ExitStack() as stack:
                for stage in self._fit.stages:
                    stack.enter_context(stage.float_activations())
                yield
        finally:
            self._live = True

    def _pull(self, logits: Tensor, taught: Tensor) -> Callable[[Tensor], Tensor]:
        """What is done to the gradient at the logits."""
        share, heat, axis = self.distillation.weight, self.distillation.temperature, self.distillation.class_axis
        if logits.shape[axis] == 1:
            apart = (logits.float() / heat).sigmoid() - (taught.float() / heat).sigmoid()
        else:
            apart = (logits.float() / heat).softmax(axis) - (taught.float() / heat).softmax(axis)
        added = apart * (share * heat * logits.shape[axis] / logits.numel() * self._scale())
        return lambda gradient: (1 - share) * gradient + added.to(gradient)

    def _scale(self) -> float:
        """By which Lightning multiplies the loss before it goes back."""
        assert self._fit is not None
        trainer = self._fit.trainer
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        return scale / trainer.accumulate_grad_batches if self._fit.module.automatic_optimization else scale

    # --- the fit ends, or is taken up

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._live = [], False

    def state(self) -> dict[str, Any]:
        """The teacher."""
        return {"teacher": dict(self._weights), "target": self._target}

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        self._weights = dict(state.get("teacher", {}))
        self._target = state.get("target", self.distillation.module)


class _Copies(dict[Tensor, Tensor]):
    """One copy of each tensor, however many names it has."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self._device = device

    def __missing__(self, key: Tensor) -> Tensor:
        self[key] = copy = key.detach().clone() if self._device is None else key.to(self._device)
        return copy
