"""Calling and tracing a model, the model being left as it was: what the formats share that trace."""

from __future__ import annotations

import dataclasses
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.registry import Inputs
from lightning_xai_compress.layers import tensor_places

__all__ = [
    "WeightsFirst",
    "batched_inputs",
    "call",
    "call_of",
    "calls",
    "check_call",
    "check_examples",
    "check_traceable",
    "dynamic_sizes",
    "evaluation",
    "export_program",
    "first_line",
    "named_inputs",
    "named_outputs",
    "not_traceable",
    "quiet",
    "to_device",
]

_CHATTY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient and without fused attention kernels, which cannot be traced.

    Afterwards every module has the attributes it had: training flags, and what torch.export or forward put in place.
    """
    before = {module: dict(vars(module)) for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, attributes in before.items():
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


def to_device(model: nn.Module, example: Inputs) -> Inputs:
    """Move the tensors of an example to where the model is."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), call_of(example))
    return Inputs(args, kwargs)


def call(model: nn.Module, example: Inputs) -> dict[str, Tensor]:
    """Call the model; buffers that it writes to are copies.

    Returns:
        Its output tensors, named by their keys, fields or positions.

    Raises:
        ArtifactError: The model cannot be called so, or returns no tensor.
    """
    copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    buffers = {place: copies[name] for place, name in tensor_places(model).items() if name in copies}
    try:
        output = torch.func.functional_call(model, buffers, *call_of(example), tie_weights=False)
    except Exception as error:  # whatever the model's own code raises
        raise ArtifactError(
            f"{type(model).__name__} cannot be called with the example: {first_line(error)}. "
            "Give examples=[Inputs(args, kwargs)] that model(*args, **kwargs) takes"
        ) from error
    outputs = named_outputs(output)
    if not outputs:
        raise ArtifactError(f"{type(model).__name__} returns no tensor, but {type(output).__name__}: nothing to export")
    return {name: tensor.detach() for name, tensor in outputs.items()}


def named_inputs(model: nn.Module, example: Inputs) -> dict[str, Tensor]:
    """Tensors of a call under the names of the arguments of `forward`, in the order in which they are flattened."""
    positional = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            positional += [f"{parameter.name}_{index}" for index in range(len(example.args))]
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            positional.append(parameter.name)
    named: dict[str, Tensor] = {}
    for path, leaf in pytree.tree_flatten_with_path(call_of(example))[0]:
        if isinstance(leaf, Tensor):
            # (0, i, ...) is in the i-th positional argument, (1, "x", ...) in the keyword argument x
            which, first, *rest = (getattr(key, "idx", getattr(key, "key", getattr(key, "name", ""))) for key in path)
            if which == 0 and int(first) >= len(positional):
                raise ArtifactError(
                    f"{type(model).__name__}.forward takes {len(positional)} positional arguments, got more: give one "
                    "input an argument"
                )
            named["_".join(str(key) for key in (positional[int(first)] if which == 0 else first, *rest))] = leaf
    return named


def check_examples(name: str, examples: Sequence[Inputs]) -> None:
    """Refuse to trace without an example.

    Raises:
        ArtifactError: There is none.
    """
    if not examples:
        raise ArtifactError(
            f"the format {name!r} traces the model with an example, but there is none: "
            f"pass examples=[Inputs((x,))], or leave {name!r} out of formats"
        )


def calls(model: nn.Module, examples: Sequence[Inputs]) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Named inputs and outputs of all examples.

    Raises:
        ArtifactError: The model cannot be called so, or the examples take or give different tensors.
    """
    inputs = [named_inputs(model, example) for example in examples]
    outputs = [call(model, example) for example in examples]
    for label, tensors in (("take", inputs), ("give", outputs)):
        if any(entry.keys() != tensors[0].keys() for entry in tensors):
            raise ArtifactError(f"the examples {label} different tensors: {[list(entry) for entry in tensors]}")
    return inputs, outputs


def export_program(
    model: nn.Module, example: Inputs, inputs: Sequence[Mapping[str, Tensor]], *, weights: Sequence[str] = ()
) -> torch.export.ExportedProgram:
    """Trace the model as a function of a flat list of tensors: some of its weights, then its inputs.

    Args:
        model: In evaluation mode.
        example: The call to trace.
        inputs: Named tensors of all examples, that one first: dimensions in which they differ become dynamic.
        weights: Parameters that become inputs, ahead of the others.

    Raises:
        ArtifactError: The model cannot be traced.
    """
    first = inputs[0]
    batched = batched_inputs(first)
    # a traced size of 1 would count as a constant
    twice = [
        torch.cat([tensor] * 2) if name in batched and tensor.shape[0] == 1 else tensor
        for name, tensor in first.items()
    ]
    sizes: list[dict[int, Any]] = [{} for _ in weights]
    sizes += [dynamic_sizes(name, inputs, batched) for name in first]
    parameters = dict(model.named_parameters())
    try:
        with quiet():
            return torch.export.export(
                WeightsFirst(model, weights, example),
                (*(parameters[name].detach() for name in weights), *twice),
                dynamic_shapes={"tensors": tuple(sizes)},
                strict=False,
            )
    except Exception as error:  # torch.export lets through whatever the model's own code raises
        labels = [*weights, *first]
        reason = re.sub(r"L\['tensors'\]\[(\d+)\]", lambda match: labels[int(match.group(1))], first_line(error))
        raise not_traceable(model, reason) from error


def not_traceable(model: nn.Module, reason: str) -> ArtifactError:
    """The error of a model that torch.export refuses."""
    return ArtifactError(
        f"{type(model).__name__} could not be traced: {reason}. Leave formats that trace (onnx, pt2) out, "
        "or define a forward that torch.export can trace: no branches on the values of tensors, no fixed batch size"
    )


def check_call(model: nn.Module, example: Inputs) -> None:
    """Call the model, and forget what it gives.

    Raises:
        ArtifactError: It cannot be called so, or gives no tensor.
    """
    with evaluation(model):
        call(model, to_device(model, example))


def check_traceable(model: nn.Module, examples: Sequence[Inputs]) -> None:
    """Try to trace, and forget the result.

    Raises:
        ArtifactError: The model cannot be called with the examples, or not be traced.
    """
    with evaluation(model):
        moved = [to_device(model, example) for example in examples]
        call(model, moved[0])
        export_program(model, moved[0], [named_inputs(model, example) for example in moved])


def batched_inputs(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the inputs whose first dimension is as long as that of the first that has one."""
    batch = next((tensor.shape[0] for tensor in tensors.values() if tensor.dim()), 0)
    return [name for name, tensor in tensors.items() if tensor.dim() and tensor.shape[0] == batch]


class WeightsFirst(nn.Module):
    """The model as a function of a flat list of tensors: first the weights to quantize, then its inputs."""

    def __init__(self, model: nn.Module, weights: Sequence[str], example: Inputs) -> None:
        super().__init__()
        self.model = model
        self.weights = list(weights)
        self.places_of = tensor_places(model)
        leaves, self.structure = pytree.tree_flatten(call_of(example))
        self.places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Weights, then inputs; output tensors in the order of their names."""
        given = dict(zip(self.weights, tensors, strict=False))
        weights = {place: given[name] for place, name in self.places_of.items() if name in given}
        leaves: list[Any] = list(self.constants)
        for index, tensor in zip(self.places, tensors[len(given) :], strict=True):
            leaves[index] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        output = torch.func.functional_call(self.model, weights, args, kwargs, tie_weights=False)
        return tuple(named_outputs(output).values())


def call_of(example: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call."""
    return tuple(example.args), dict(example.kwargs or {})


def dynamic_sizes(name: str, inputs: Sequence[Mapping[str, Tensor]], batched: Sequence[str]) -> dict[int, Any]:
    """Say which dimensions of an input are dynamic: the batch, and those in which the examples differ."""
    tensors = [entry[name] for entry in inputs if entry[name].dim() == inputs[0][name].dim()]
    sizes = [set(column) for column in zip(*(tensor.shape for tensor in tensors), strict=True)]
    dynamic: dict[int, Any] = {index: torch.export.Dim.DYNAMIC for index, column in enumerate(sizes) if len(column) > 1}
    if name in batched:
        # a mask of [tokens, tokens] may have the size of the batch by chance, so only the first input is held to it
        dynamic.setdefault(0, torch.export.Dim.DYNAMIC if name == batched[0] else torch.export.Dim.AUTO)
    return dynamic


def named_outputs(output: Any, name: str = "") -> dict[str, Tensor]:
    """Tensors of an output, named by their keys, fields or positions; what is no tensor is left out."""
    if isinstance(output, Tensor):
        return {name or "output": output}
    items: list[tuple[Any, Any]] = []
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        items = list(zip(output._fields, output, strict=True))
    elif isinstance(output, (tuple, list)):
        items = list(enumerate(output))
        name = name or "output"
    elif dataclasses.is_dataclass(output):
        items = [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    named: dict[str, Tensor] = {}
    for key, value in items:
        named |= named_outputs(value, f"{name}_{key}" if name else str(key))
    return named


def first_line(error: Exception) -> str:
    """The first line of an error, with its type."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # the exporter paints its messages
    text = next((line.strip() for line in plain.splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {text.rstrip('.')}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporter says to its own developers."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    try:
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
