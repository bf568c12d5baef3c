"""A new model made as small as the one in a file that lost channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.layout import Entry
from lightning_xai_compress.sizes import restoring, sizes_fitted

__all__ = ["resized", "structure_text"]

_STRUCTURE = "structure"  # in the provenance of a file: "channel" where channels were removed
_SHAPES = "dense_shapes"  # and a checksum of the shapes that the smaller weights had
_RESIZABLE = (nn.Linear, _ConvNd, _BatchNorm, nn.PReLU)


def structure_text(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """What a file without some channels says of them in its provenance.

    Args:
        shapes: That all weights that lost some had before, by name.
    """
    text = "\n".join(f"{name} {list(map(int, shape))}" for name, shape in sorted(shapes.items()))
    return {_STRUCTURE: "channel", _SHAPES: f"{crc32(text.encode()):08x}"}


@contextmanager
def resized(model: nn.Module, entries: Sequence[Entry], provenance: Mapping[str, Any]) -> Iterator[None]:
    """Give layers that are larger than in the file new tensors of its shapes; after an error inside, the old ones.

    Args:
        model: As it was before channels went. Layers of other kinds, and such that are smaller than in the file, are
            left for others to refuse.
        entries, provenance: Of the file.

    Raises:
        ArtifactError: The file lost channels of a model of other sizes.
    """
    if _STRUCTURE not in provenance:
        yield
        return
    shapes = {entry.name: entry.shape for entry in entries}
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    other = {name: shape for name, shape in own.items() if len(shape) > 1 and shape != shapes.get(name, shape)}
    if other and shapes.keys() <= own.keys() and structure_text(other)[_SHAPES] != provenance.get(_SHAPES):
        name, shape = next(iter(other.items()))
        raise ArtifactError(
            f"the file holds fewer channels of a model of other sizes than this {type(model).__name__} ({name} has "
            f"shape {shapes[name]} in the file, {shape} here): expected a model as it was before compression"
        )
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
