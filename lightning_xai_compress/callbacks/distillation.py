"""The stage that lets the dense model teach the compressed one, without a change to `training_step`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.clock import Moment, check_moment
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
        outputs: "classes": logits of one class among several, softened by softmax along `class_axis`; "labels": logits
            of labels that do not exclude each other, by the logistic function, as a single logit is in any case.
        module: Name of the submodule that makes the logits from the inputs, where that is neither the LightningModule
            nor the one child that `training_step` calls; "" for the LightningModule.
        class_axis: Axis of the logits that counts classes.
    """

    weight: float = 0.7
    temperature: float = 3.0
    outputs: Literal["classes", "labels"] = "classes"
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
        if self.outputs not in ("classes", "labels"):
            raise ValueError(f"outputs must be 'classes' or 'labels', got {self.outputs!r}")
        if self.module is not None and not isinstance(self.module, str):
            raise ValueError(f"module must be the name of a submodule, got {self.module!r}")


@dataclass
class _Call:
    """Of a watched module, under way.

    Args:
        name: Of the module.
        taught: What the teacher says to the same input; None where it does not teach.
        counts: False for one that is part of another, and where ddp calls the LightningModule for `training_step`.
    """

    name: str
    taught: Tensor | None
    counts: bool


class DenseTeacher(CompressionCallback, Stage):
    """Distillation (Hinton, Vinyals & Dean 2015, arXiv 1503.02531) from the dense model.

    When compression begins, or before it at `start`, the weights are copied. From then on that copy sees, in evaluation
    mode, every input of the training, and in the backward pass of the loss the gradient at the logits z of n
    predictions becomes (1 - w) g + w T (softmax(z / T) - softmax(t / T)) / n: that of (1 - w) loss +
    w T^2 KL(softmax(t / T) || softmax(z / T)), with t the teacher's logits, w its weight and T the temperature. What
    `training_step` returns and logs stays as it is, its own loss. All predictions count, also those that a loss leaves
    out.

    To be used beside the stages that compress. The first batch of a fit shows which module gives the logits, and is not
    taught unless that is named. Costs a forward pass a batch and the memory of the dense weights, which checkpoints
    hold, too.

    Args:
        distillation: How much it teaches.
        start: When the weights are copied if nothing has been compressed yet: epochs (whole number), a share of the
            fit, or steps ("1500 steps"); None: not before. Weights in the middle of a schedule, at a high learning
            rate, teach badly.

    Raises:
        ValueError: (in fit) no such submodule, no stage compresses, or a checkpoint of a compression without a teacher.
        RelevanceError: (in the first batch) what gives the logits was not found, there are several, or it gets features
            of trained weights, of which the dense model would have others.
    """

    rank: ClassVar[int] = 6

    def __init__(self, distillation: Distillation | None = None, *, start: Moment | None = None) -> None:
        super().__init__()
        if distillation is not None and not isinstance(distillation, Distillation):
            raise ValueError(f"distillation must be a Distillation(...), got {distillation!r}")
        self.distillation = distillation or Distillation()
        self.start = None if start is None else check_moment("start of the teacher", start)
        self._first: int | None = None  # batch
        self._weights: dict[str, Tensor] = {}  # of the teacher: parameters and buffers
        self._handles: list[RemovableHandle] = []
        self._calls: list[_Call] = []
        self._watched: tuple[str, ...] = ()
        self._found: set[str] = set()  # of these, which gave logits in the first batch
        self._target = self.distillation.module
        self._teaching = False
        self._fit: Session | None = None  # whichever callback leads it

    def __getstate__(self) -> dict[str, Any]:
        """Without the fit that was, as in the base."""
        return {**super().__getstate__(), "_fit": None, "_handles": [], "_calls": []}

    def stages(self) -> list[Stage]:
        """This one."""
        return [self]

    def begin(self, session: Session) -> None:
        """Watch the modules that may give the logits."""
        if not any(isinstance(stage, RelevancePruning | MixedPrecision) for stage in session.stages):
            raise ValueError(
                "DenseTeacher needs RelevancePruning or MixedPrecision in the same Trainer: the dense model teaches "
                "the compressed one. Add them, or use XAICompression(distillation=Distillation())"
            )
        if session.started and not self._weights:
            raise ValueError(
                "this fit goes on with weights that were compressed without a teacher, so the dense model is gone: "
                "leave the distillation out, or go on from a checkpoint before compression began"
            )
        self._first = None if self.start is None else session.clock.check("start of the teacher", self.start)
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
        # a compiled module would trace its hooks
        enter, leave = torch.compiler.disable(self._enter), torch.compiler.disable(self._leave)
        for at, module in watched.items():
            self._handles += [
                module.register_forward_pre_hook(functools.partial(enter, at), with_kwargs=True),
                module.register_forward_hook(functools.partial(leave, at), always_call=True),
            ]
        self._move(session.module.device)

    def before_compression(self, session: Session, batch: int) -> None:
        """From here on the module is no longer dense."""
        self._copy(session)

    def _copy(self, session: Session) -> None:
        """Keep the dense model, if there is none yet."""
        if not self._weights:
            module, copies = session.module, _Copies()
            session.processes.share_buffers(module)
            # under all their names: a submodule that is taught may know them by another one
            for named in (module.named_parameters, module.named_buffers):
                self._weights |= {name: copies[value] for name, value in named(remove_duplicate=False)}

    def advance(self, session: Session, batch: int) -> None:
        """Nothing is under way."""
        self._calls.clear()
        if self._first is not None and batch >= self._first and not session.stopped():
            self._copy(session)

    def after_batch(self, session: Session) -> None:
        """After the first batch it is known what gives the logits."""
        if self._target is not None and self._found:
            return
        found = {""} if "" in self._found else self._found  # the module calls its children
        if len(found) != 1:
            came = f"logits came from {sorted(self._found)}" if self._found else "none gave a tensor of logits"
            raise RelevanceError(
                f"the dense model cannot teach: of {sorted(self._watched)}, which training_step may call ('' is the "
                f"LightningModule), {came}. Let one module make the logits from the inputs, and name it as "
                "Distillation(module=...)"
            )
        self._target = next(iter(found))

    # --- during a training step

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A watched module is called: the teacher goes first, so that what a forward leaves behind is the student's."""
        if not self._listens(name):
            return
        for_step = not name and not inspect.ismethod(module.forward)
        counts = not for_step and not (name and any(call.name for call in self._calls))
        taught = None
        if counts and name == self._target and self._weights and torch.is_grad_enabled():
            taught = find_logits(self._teach(name, module, args, kwargs))
        self._calls.append(_Call(name, taught, counts))

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Its logits are there, or (None) it failed."""
        if not self._listens(name) or not self._calls:
            return
        call = self._calls.pop()
        logits = self._logits(output) if call.counts and torch.is_grad_enabled() else None
        if logits is None:
            return
        self._found.add(name)
        if call.taught is not None:
            logits.register_hook(self._pull(logits.detach().clone(), call.taught))

    def _listens(self, name: str) -> bool:
        within = self._fit is not None and self._fit.in_step and not self._teaching
        return within and self._target in (None, name)

    def _logits(self, output: Any) -> Tensor | None:
        """Of a call; None where it is something else: a loss, a metric, features that are not trained."""
        named, axis = self.distillation.module is not None, self.distillation.class_axis
        try:
            logits = find_logits(output)
        except RelevanceError:
            if named and output is not None:
                raise
            return None
        if not logits.requires_grad:
            return None
        if -logits.dim() <= axis < logits.dim() or (named and (logits.dim() == 1 or self._by_label)):
            return logits
        if named:
            raise RelevanceError(
                f"Distillation(class_axis={axis}) does not fit logits of shape {tuple(logits.shape)}: name the axis "
                "that counts classes"
            )
        return None

    @property
    def _by_label(self) -> bool:
        return self.distillation.outputs == "labels"

    def _teach(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The teacher's output; the training notices nothing."""
        given = tree_leaves((args, kwargs))
        if any(isinstance(each, Tensor) and each.requires_grad and not each.is_leaf for each in given):
            raise RelevanceError(
                f"the dense model cannot teach {name or type(module).__name__!r} alone: what it is called with "
                "depends on trained weights, of which the dense model has others. Let one module make the logits "
                "from the inputs, and name it as Distillation(module=...)"
            )
        assert self._fit is not None
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): value for key, value in self._weights.items() if key.startswith(prefix)}
        copied = tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, (args, dict(kwargs)))
        self._teaching = True
        try:
            with isolate_rng(), evaluation(module), torch.no_grad(), ExitStack() as stack:
                for stage in self._fit.stages:
                    stack.enter_context(stage.float_activations())
                return functional_call(module, own, *copied)
        finally:
            self._teaching = False

    def _pull(self, logits: Tensor, taught: Tensor) -> Callable[[Tensor], Tensor | None]:
        """What is done to the gradient at the logits, once, and only when the loss goes back."""
        share, heat, axis = self.distillation.weight, self.distillation.temperature, self.distillation.class_axis
        student, teacher = logits.float() / heat, taught.float() / heat
        if self._by_label or logits.dim() == 1 or logits.shape[axis] == 1:
            apart, classes = student.sigmoid() - teacher.sigmoid(), 1
        else:
            apart, classes = student.softmax(axis) - teacher.softmax(axis), logits.shape[axis]
        factor = share * heat * classes / logits.numel()
        due, session = [apart], self._fit
        assert session is not None

        def pull(gradient: Tensor) -> Tensor | None:
            if not session.in_backward or not due:
                return None
            return (1 - share) * gradient + (due.pop() * (factor * _scale(session))).to(gradient)

        return pull

    # --- the fit ends, or is taken up

    def close(self) -> None:
        """Take the hooks away, and what the teacher holds off the device."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._calls.clear()
        self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        moved = _Copies(device)
        self._weights = {name: moved[value] for name, value in self._weights.items()}

    def state(self) -> dict[str, Any]:
        """The teacher."""
        return {"teacher": dict(self._weights), "target": self._target}

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        self._weights = dict(state.get("teacher", {}))
        self._target = state.get("target") if self.distillation.module is None else self.distillation.module


def _scale(session: Session) -> float:
    """By which Lightning multiplies the loss before it goes back."""
    scaler = getattr(session.trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    return scale / session.trainer.accumulate_grad_batches if session.module.automatic_optimization else scale


class _Copies(dict[Tensor, Tensor]):
    """One copy of each tensor, however many names it has."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self._device = device

    def __missing__(self, key: Tensor) -> Tensor:
        self[key] = copy = key.detach().clone() if self._device is None else key.to(self._device)
        return copy
