"""Telling what a packed file holds: its tensors, how many bytes each takes, and where the file comes from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.layout import CODES
from lightning_xai_compress.formats.load_file import Decoded, PackedFile, decode, open_packed
from lightning_xai_compress.formats.registry import Contents, Stored

__all__ = ["read_packed"]


def read_packed(path: Path) -> Contents:
    """Tell what a file holds: every key of the state dict; one that shares another's tensor takes no bytes.

    The bytes of all tensors and those of header and index add up to the size of the file. The stream is shared by what
    each tensor takes of it, to the bit, with the tables in proportion; a chunk of the rest by how many of its numbers
    are a tensor's.

    Raises:
        FileNotFoundError: No such file.
        ArtifactError: The file is damaged, cut short, of another version, or none of ours.
    """
    with open_packed(path) as file:
        provenance = _provenance(file)
        made = list(decode(file).values())
        stored = file.stored
        stream, rest = (file.container.places[part][1] for part in ("stream", "rest"))
    place = np.array([tensor.rest_bytes for tensor in made])
    coded = np.array([tensor.widths is not None or tensor.stream_bits > 0 for tensor in made], np.float64)
    bits = np.array([tensor.stream_bits for tensor in made]) + 1e-6 * coded
    place += bits * (stream / bits.sum()) if bits.any() else 0.0
    assert not made or abs(place.sum() - stream - rest) < 0.5
    sizes = _whole(place)
    found = {tensor.entry.name: (tensor, size) for tensor, size in zip(made, sizes, strict=True)}
    tensors = []
    for name, first in stored.items():
        tensor, size = found[first]
        tensors.append(Stored(name, tensor.values, _widths(tensor), size if name == first else 0))
    return Contents(tuple(tensors), provenance)


def _whole(sizes: NDArray[np.float64]) -> list[int]:
    """Round sizes so that their sum stays what it is."""
    ends = np.rint(np.cumsum(sizes)).astype(np.int64)
    return [int(size) for size in np.diff(ends, prepend=0)]


def _widths(tensor: Decoded) -> dict[int, int]:
    if tensor.entry.kind != CODES or tensor.widths is None:
        return {}
    widths, rows = np.unique(tensor.widths, return_counts=True)
    return {int(width): int(count) for width, count in zip(widths, rows, strict=True)}


def _provenance(file: PackedFile) -> dict[str, str]:
    """What the plan said, and with which versions the file was written."""
    given, versions = file.index.get("provenance", {}), file.index.get("versions", {})
    for content in (given, versions):
        if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
            raise ArtifactError(
                f"{file.source} is damaged: expected texts that say where it comes from, got {str(content)[:100]!r}; "
                "copy it again, or export it again"
            )
    return {**given, **{f"written by {name}": version for name, version in versions.items()}}
