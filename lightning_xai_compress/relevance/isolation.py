"""A forward pass over detached tensors that leaves the user's model as it was found, whatever happens in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.layers import tensor_places
from lightning_xai_compress.relevance.explain import Explain, Explained, explained_tensor, input_tensors

__all__ = ["Isolated", "evaluation", "isolated", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or the module itself."""
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules; afterwards each has its own flag back.

    What was compiled runs as it was written: a look at the model makes no graphs beside those of the training.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in flags:
            module.training = training


class Isolated:
    """A model whose parameters and buffers are replaced for a pass.

    Args:
        model: The user's.
        weights: Names of the parameters that need a gradient.

    Attributes:
        leaves: All parameters by name, float32 at least, detached.

    Raises:
        RelevanceError: A lazy layer without a weight yet.
    """

    def __init__(self, model: nn.Module, weights: Sequence[str]) -> None:
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.leaves = {name: _leaf(name, parameter) for name, parameter in model.named_parameters()}
        for prefix, module in model.named_modules():
            masked = getattr(module, "weight_mask", None)
            name = f"{prefix}.weight_orig" if prefix else "weight_orig"
            if isinstance(masked, Tensor) and name in self.leaves:  # torch.nn.utils.prune: as if made permanent
                self.leaves[name] = self.leaves[name] * masked.detach()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
                name = f"{prefix}.weight" if prefix else "weight"
                self.leaves[name] = self.leaves[name].clone()  # its forward pass rescales the weight in place
        for name in weights:
            self.leaves[name].requires_grad_()
        # clones, so that a forward pass that writes to its buffers writes to ours
        buffers = {name: _to_float(buffer.detach()).clone() for name, buffer in model.named_buffers()}
        replaced = self.leaves | buffers
        self._tensors = {f"model.{place}": replaced[name] for place, name in tensor_places(model).items()}
        self._explainable = _Explainable(model)

    def prepare(self, batch: Any, *, track: bool = False) -> tuple[Any, list[Tensor]]:
        """Give a batch that may come from inference mode, or in half precision, to autograd in float32.

        Args:
            batch: Nested lists, tuples and mappings of tensors and other things.
            track: Whether its floating-point inputs need a gradient.

        Returns:
            The batch, and the leaves of the inputs that are tracked.
        """
        leaves: list[Tensor] = []
        batch = _each(batch, lambda tensor: _to_float(tensor.detach().clone()))  # the model may write to its input
        chosen = {id(tensor) for tensor in input_tensors(batch)} if track else set()

        def tracked(tensor: Tensor) -> Tensor:
            if id(tensor) not in chosen:
                return tensor
            leaves.append(tensor.requires_grad_())
            return leaves[-1].clone()

        return _each(batch, tracked), leaves

    def replaced(self, batch: Any, function: Callable[[list[Tensor]], list[Tensor]]) -> Any:
        """The prepared batch with others in place of its floating-point inputs (`input_tensors`)."""
        batch, _ = self.prepare(batch)
        inputs = input_tensors(batch)
        others = dict(zip(map(id, inputs), function(inputs), strict=True))
        return _each(batch, lambda tensor: others.get(id(tensor), tensor))

    def run(self, batch: Any, batch_idx: int, explain: Explain) -> Explained:
        """Explain a prepared batch, see `explained_tensor`."""
        explained: Explained = torch.func.functional_call(
            self._explainable, self._tensors, (batch, batch_idx, explain), tie_weights=False
        )
        return explained

    def check_device(self, batch: Any, batch_idx: int) -> None:
        """Refuse a batch that lies elsewhere.

        Raises:
            RelevanceError: It names both devices.
        """

        def check(tensor: Tensor) -> Tensor:
            if tensor.device.type != self.device.type and tensor.dim():
                raise RelevanceError(
                    f"batch {batch_idx} is on {tensor.device}, but the model is on {self.device}: move one to the other"
                )
            return tensor

        _each(batch, check)


@contextmanager
def isolated(model: nn.Module, weights: Sequence[str]) -> Iterator[Isolated]:
    """Float32 without autocast, with gradients, in evaluation mode; random state and what modules hold are kept."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    held = [(module, _attributes(module)) for module in model.modules()]
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),  # the interception would be compiled, too, again and again
            _without_checkpoints(),
            torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type),
            evaluation(model),
        ):
            yield Isolated(model, weights)
    finally:
        for module, attributes in held:
            _put_back(module, attributes)


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Keep the activations of checkpointed parts: run again in the backward pass, they would not be intercepted."""
    module: Any = torch.utils.checkpoint
    held = module._checkpoint_impl
    try:
        module._checkpoint_impl = lambda function, args, kwargs, **settings: function(*args, **kwargs)
        yield
    finally:
        module._checkpoint_impl = held


class _Explainable(nn.Module):
    """Makes `explained_tensor` a forward, which is what `functional_call` can call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = False
        self.model = model

    def forward(self, batch: Any, batch_idx: int, explain: Explain) -> Explained:
        return explained_tensor(self.model, batch, batch_idx, explain)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Everything that a module holds, with a copy of its lists, dictionaries and sets."""
    return {
        name: (value, next((kind(value) for kind in (list, dict, set) if isinstance(value, kind)), None))
        for name, value in module.__dict__.items()
    }


def _put_back(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    for name in module.__dict__.keys() - attributes.keys():
        del module.__dict__[name]
    for name, (value, content) in attributes.items():
        module.__dict__[name] = value
        if isinstance(value, list) and list(map(id, value)) != list(map(id, content)):
            value[:] = content
        elif isinstance(value, dict | set) and _ids(value) != _ids(content):
            value.clear()
            value.update(content)


def _ids(value: Any) -> Any:
    return [(key, id(each)) for key, each in value.items()] if isinstance(value, dict) else set(map(id, value))


def _leaf(name: str, parameter: Tensor) -> Tensor:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise RelevanceError(f"{name} is of a lazy layer that has not seen a batch: run the model on one first")
    return _to_float(parameter.detach().clone() if parameter.is_inference() else parameter.detach())


def _to_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _each(value: Any, function: Any) -> Any:
    """The same nested structure with a function applied to its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _each(member, function) for key, member in value.items()}
    if isinstance(value, list | tuple):
        members = [_each(member, function) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    return value
