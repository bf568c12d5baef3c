"""Which channels are coupled: the dependency graph of Torch-Pruning (Fang et al. 2023), used here alone."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_xai_compress.errors import CompressionError
from lightning_xai_compress.plan import Skipped
from lightning_xai_compress.structure.channels import ChannelGroup, ChannelSlice
from lightning_xai_compress.structure.heads import find_heads, overlaps

__all__ = ["find_channels", "flattened_otherwise"]

_WITHIN = -1  # stands for the place of an input within its group


def find_channels(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: Collection[str]
) -> tuple[list[ChannelGroup], list[Skipped]]:
    """Find the groups of channels that can go.

    Args:
        model: In evaluation mode; it runs once, and is left as it was.
        args, kwargs: Of its forward.
        layers: Names of the weights that may be masked: a group that needs another one is skipped.

    Returns:
        Groups in the order of the model, and what cannot go, with the reason.

    Raises:
        ImportError: The extra `structured` is not installed.
        CompressionError: The model cannot be traced.
    """
    if find_spec("torch_pruning") is None:
        raise ImportError("structure='channel' needs Torch-Pruning: pip install lightning-xai-compress[structured]")
    import torch_pruning

    example = dict(kwargs) if kwargs and not args else tuple(args)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # parameters outside of layers: those groups are skipped below
            graph = torch_pruning.DependencyGraph().build_dependency(model, example, verbose=False)
            found = [*graph.get_all_groups(root_module_types=[_ConvNd, nn.Linear])]
    except Exception as error:
        raise CompressionError(
            f"{type(model).__name__} cannot be traced for structure='channel', which needs a forward that returns "
            f"tensors, or lists, tuples or mappings of them: {type(error).__name__}: {error}"
        ) from error
    names = {id(module): name for name, module in model.named_modules()}
    tied = _tied(model)
    order = {name: at for at, (name, _) in enumerate(model.named_parameters())}
    heads = find_heads(model, set(layers) - tied)
    groups, skipped = [*heads], []
    for each in found:
        root = f"{names[id(each[0].dep.target.module)]}.weight"
        try:
            group = _read(each, root, names, set(layers) - tied, tied)
            groups += [] if overlaps(group, heads) else [group]
        except _CannotGoError as reason:
            skipped += [Skipped(name, f"its channels stay: {reason}") for name in _makers(each, root, names)]
    named = [replace(each, name=min((part.name for part in each.makers), key=order.__getitem__)) for each in groups]
    return sorted(named, key=lambda each: order[each.name]), skipped


def flattened_otherwise(group: ChannelGroup) -> list[ChannelGroup]:
    """The same channels, read in other orders where they are flattened: after a permutation of [n, c, h, w], say.

    The graph takes it that a flattened layer reads all places of a channel side by side. What is right is found by
    trying (`unlike`).

    Args:
        group: As the graph has it.

    Returns:
        A group for each number of places that may come before the channel; none where nothing is flattened.
    """
    places = {part.index.shape[1] for part in group.slices if _flat(part, len(group))}
    found = []
    for outer in range(2, max(places, default=0) + 1):
        if all(each % outer == 0 for each in places):
            slices = [_strided(part, outer) if _flat(part, len(group)) else part for part in group.slices]
            found.append(replace(group, slices=tuple(slices)))
    return found


def _flat(part: ChannelSlice, channels: int) -> bool:
    count = part.index.shape[1]
    side_by_side = torch.arange(channels * count).view(channels, count)
    return part.axis == 1 and not part.makes and count > 1 and torch.equal(part.index, side_by_side)


def _strided(part: ChannelSlice, outer: int) -> ChannelSlice:
    channels, count = part.index.shape
    entries = torch.arange(channels * count).view(outer, channels, count // outer)
    return replace(part, index=entries.transpose(0, 1).reshape(channels, count))


class _CannotGoError(Exception):
    """Why the channels of a group stay."""


def _read(
    group: Any, root: str, names: Mapping[int, str], layers: Collection[str], tied: Collection[str]
) -> ChannelGroup:
    slices: list[ChannelSlice] = []
    used, widths = False, set[int]()  # of the groups of grouped convolutions
    size = len(group[0].idxs)
    for item in group:
        dependency = item.dep
        module, handler = dependency.target.module, dependency.handler.__name__
        if id(module) not in names:
            if isinstance(module, nn.Parameter):
                raise _CannotGoError("a parameter outside of layers shares them")
            continue  # an operation without weights
        name, inputs = names[id(module)], "in_channels" in handler
        index = _index(item.idxs, item.root_idxs, size)
        if isinstance(module, _ConvNd | nn.Linear):
            if isinstance(module, _ConvNd) and module.groups > 1 and not _depthwise(module):
                if index.shape[1] != 1 or not torch.equal(index[:, 0], torch.arange(size)):
                    raise _CannotGoError(f"{name} is a grouped convolution that they share with others")
                widths.add(size // module.groups)
                if inputs:
                    index = torch.full_like(index, _WITHIN)
            if f"{name}.weight" in tied:
                raise _CannotGoError(f"{name} shares its weight with another layer")
            if f"{name}.weight" not in layers:
                raise _CannotGoError(f"{name}, which is not compressed, shares them")
            flipped = isinstance(module, _ConvTransposeNd) and not _depthwise(module)
            axis = int(not inputs) if flipped else int(inputs)
            if not inputs and index.unique().numel() < module.weight.shape[axis]:
                raise _CannotGoError(f"they are but a part of the channels of {name}, or meet them all at once")
            if int(index.max()) >= module.weight.shape[axis]:
                raise _CannotGoError(f"what {name} reads of them cannot be followed")
            slices.append(ChannelSlice(f"{name}.weight", axis, index, makes=not inputs))
            if module.bias is not None and not inputs:
                slices.append(ChannelSlice(f"{name}.bias", 0, index))
            used |= inputs
        elif isinstance(module, _BatchNorm | nn.PReLU):
            leaves = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            most = int(index.max())  # a PReLU may have one slope for all
            slices += [
                ChannelSlice(f"{name}.{leaf}", 0, index)
                for leaf, tensor in leaves
                if tensor.dim() == 1 and len(tensor) > most
            ]
        elif [*module.parameters()]:
            raise _CannotGoError(f"{name} ({type(module).__name__}) looks at all of them together")
    if not used:
        raise _CannotGoError("nothing in the model uses them but its output")
    if len(widths) > 1:
        raise _CannotGoError("they meet grouped convolutions of different groups")
    return ChannelGroup(root, tuple(_even(each, width) for width in widths for each in slices) or tuple(slices))


def _makers(group: Any, root: str, names: Mapping[int, str]) -> list[str]:
    """Names of the weights that make the channels of a group of the graph, the root first."""
    found = [root]
    for item in group:
        module = item.dep.target.module
        if isinstance(module, _ConvNd | nn.Linear) and "out_channels" in item.dep.handler.__name__:
            found.append(f"{names[id(module)]}.weight")
    return [*dict.fromkeys(found)]


def _even(part: ChannelSlice, width: int) -> ChannelSlice:
    """Channels of the same place in all groups of a grouped convolution as one, since groups must stay alike."""
    if bool((part.index == _WITHIN).all()):  # its weights know an input by its place in the group alone
        return replace(part, index=torch.arange(width).unsqueeze(1))
    entries = part.index.shape[1]
    return replace(part, index=part.index.view(-1, width, entries).movedim(0, 1).reshape(width, -1))


def _tied(model: nn.Module) -> set[str]:
    """All names of parameters that several modules share."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():  # a module of two names is one
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"{prefix}.{name}".removeprefix("."))
    return {name for each in names.values() if len(each) > 1 for name in each}


def _depthwise(module: _ConvNd) -> bool:
    return module.groups > 1 and module.groups == module.in_channels


def _index(entries: Sequence[int], roots: Sequence[int], channels: int) -> Tensor:
    """Entries by channel, of which each has as many."""
    found: list[list[int]] = [[] for _ in range(channels)]
    for entry, root in zip(entries, roots, strict=True):
        found[root].append(entry)
    if len({len(each) for each in found}) != 1 or not found[0]:
        raise _CannotGoError("they do not take the same share of every layer")
    return torch.tensor(found, dtype=torch.int64)
