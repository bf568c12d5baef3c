"""Tracing a model for torch.export, its quantized weights being put together inside the graph."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_xai_compress.formats.pt2_planes import PackedWeight
from lightning_xai_compress.formats.registry import Inputs
from lightning_xai_compress.formats.tracing import (
    batched_inputs,
    call_of,
    dynamic_sizes,
    first_line,
    named_inputs,
    not_traceable,
    quiet,
)
from lightning_xai_compress.layers import tensor_places

__all__ = ["trace_program", "with_packed_weights"]


def with_packed_weights(model: nn.Module, packed: Mapping[str, PackedWeight]) -> nn.Module:
    """The model as a module without parameters: what is not packed are buffers under the names that they had.

    With no packed weights: the frozen model. PyTorch multiplies by other kernels where a weight requires a gradient
    (even inside no_grad), so that only a frozen model has the very outputs of a program.

    Args:
        model: Its tensors are borrowed while `forward` runs; it is no submodule.
        packed: Quantized weights by the first name that each has.
    """
    root: nn.Module = type(type(model).__name__, (nn.Module,), {})()  # errors name the class
    places = tensor_places(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    volatile = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in model.named_modules()
        for name in part._non_persistent_buffers_set
    }
    for name in dict.fromkeys(places.values()):
        path, _, last = name.rpartition(".")
        owner = root
        for step in path.split(".") if path else []:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        if name in packed:
            owner.add_module(last, packed[name])
        else:
            owner.register_buffer(last, _own_memory(tensors[name]), persistent=name not in volatile)
    root.forward = _forward(model, root, places, packed)
    return root


def trace_program(
    model: nn.Module, packed: Mapping[str, PackedWeight], example: Inputs, inputs: Sequence[Mapping[str, Tensor]]
) -> torch.export.ExportedProgram:
    """Trace the model with the signature that it has; sizes as `tracing.dynamic_sizes` says.

    Args:
        model: In evaluation mode.
        packed: Quantized weights by name.
        example: The call to trace.
        inputs: Named tensors of all examples, that one first.

    Raises:
        ArtifactError: The model cannot be traced.
    """
    batched = batched_inputs(inputs[0])
    sizes = [dynamic_sizes(name, inputs, batched) for name in inputs[0]]
    # a traced size of 1 would count as a constant
    twice = iter(
        torch.cat([tensor] * 2) if name in batched and tensor.shape[0] == 1 else tensor.clone()
        for name, tensor in inputs[0].items()
    )
    args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(twice), call_of(example))
    shapes = torch.export.ShapesCollection()
    for tensor, size in zip(named_inputs(model, Inputs(args, kwargs)).values(), sizes, strict=True):
        shapes[tensor] = size
    try:
        with quiet():
            program = torch.export.export(
                with_packed_weights(model, packed), args, kwargs, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # torch.export lets through whatever the model's own code raises
        reason = re.sub(r"L\['(\w+)'\]", r"\1", first_line(error))
        raise not_traceable(model, reason) from error
    _forget_origin(program)
    return program


def _forward(
    model: nn.Module, root: nn.Module, places: Mapping[str, str], packed: Mapping[str, PackedWeight]
) -> Callable[..., Any]:
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        own = dict(root.named_buffers())
        made = {name: weight() for name, weight in packed.items()}
        tensors = {place: made[name] if name in made else own[name] for place, name in places.items()}
        prefixes = {id(module): prefix for prefix, module in model.named_modules()}
        for module in recurrent:  # they keep a list of their weights beside the weights
            prefix = prefixes[id(module)]
            module._flat_weights = [
                tensors[f"{prefix}.{name}".lstrip(".")] if hasattr(module, name) else None
                for name in module._flat_weights_names
            ]
        return torch.func.functional_call(model, tensors, args, kwargs, tie_weights=False)

    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return forward


def _own_memory(tensor: Tensor) -> Tensor:
    """The tensor, copied where its memory holds more than itself: the file would hold that, too."""
    tensor = tensor.detach()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def _forget_origin(program: torch.export.ExportedProgram) -> None:
    """Take out what tells of the machine and of the data: source lines, class names, the example."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom"):
                    node.meta.pop(key, None)
