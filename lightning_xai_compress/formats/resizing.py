"""A new model made as small as the one in a file that lost channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_xai_compress.formats.layout import Entry
from lightning_xai_compress.sizes import restoring, sizes_fitted

__all__ = ["STRUCTURE", "resized"]

STRUCTURE = "structure"  # in the provenance of a file: "channel" where channels were removed
_RESIZABLE = (nn.Linear, _ConvNd, _BatchNorm, nn.PReLU)


@contextmanager
def resized(model: nn.Module, entries: Sequence[Entry]) -> Iterator[None]:
    """Give layers that are larger than in the file new tensors of its shapes; after an error inside, the old ones.

    Args:
        model: As it was before channels went. Layers of other kinds, and such that are smaller than in the file, are
            left for others to refuse.
        entries: Of the file.
    """
    shapes = {entry.name: entry.shape for entry in entries}
    made: dict[int, Tensor] = {}  # tied tensors stay tied
    with restoring(model, always=False):
        with sizes_fitted(model) as changed:
            for prefix, module in model.named_modules(remove_duplicate=False):
                if isinstance(module, _RESIZABLE) and _shrink(module, prefix, shapes, made):
                    changed.add(module)
        yield


def _shrink(module: nn.Module, prefix: str, shapes: Mapping[str, tuple[int, ...]], made: dict[int, Tensor]) -> bool:
    changed = False
    for tensors in (module._parameters, module._buffers):
        for leaf, tensor in tensors.items():
            shape = shapes.get(f"{prefix}.{leaf}".removeprefix("."))
            if tensor is None or shape is None or not _larger(tensor.shape, shape):
                continue
            if id(tensor) not in made:
                empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
            tensors[leaf] = made[id(tensor)]  # type: ignore[assignment]
            changed = True
    return changed


def _larger(own: Sequence[int], stored: Sequence[int]) -> bool:
    """Along one axis or more, and along none smaller."""
    if len(own) != len(stored) or 0 in stored:
        return False
    return tuple(own) != tuple(stored) and all(mine >= theirs for mine, theirs in zip(own, stored, strict=True))
