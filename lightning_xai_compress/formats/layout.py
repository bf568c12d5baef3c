"""What writer and reader of a packed file share: the list of tensors, and the order of their bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.container import Bytes

__all__ = [
    "BITMAP",
    "CODES",
    "CODE_DTYPES",
    "DTYPES",
    "RAW",
    "Entry",
    "check_unfolded",
    "few",
    "gather",
    "raw_bytes",
    "same",
    "sharing",
]

RAW, CODES, BITMAP = range(3)  # how a tensor is stored
DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}
CODE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_CHUNK = 1 << 22  # bytes of `rest` that share byte planes
_FLOOR, _RATIO = 1 << 30, 1 << 14  # bytes that any file may unfold to; for a larger one, so many for each of its own


@dataclass(frozen=True)
class Entry:
    """One key of the state dict; `alias` is the position of an earlier key that shares its tensor."""

    name: str
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()
    kind: int = RAW
    alias: int | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def raw(self) -> bool:
        """Whether numbers of it are in `rest`."""
        return self.alias is None and self.kind != CODES

    @property
    def block(self) -> tuple[int, int, bool]:
        """Rows, columns and whether there are scales."""
        return self.shape[0], self.numel // self.shape[0], self.kind == CODES


def gather(counts: Sequence[tuple[Entry, int]]) -> list[list[tuple[Entry, int]]]:
    """Gather numbers that share byte planes: of one dtype, the same parameters of all layers side by side."""
    chunks: list[list[tuple[Entry, int]]] = []
    room = 0
    for entry, count in sorted(counts, key=lambda item: (str(item[0].dtype), item[0].name.rpartition(".")[2])):
        if room <= 0 or chunks[-1][0][0].dtype != entry.dtype:
            chunks.append([])
            room = _CHUNK
        chunks[-1].append((entry, count))
        room -= count * entry.dtype.itemsize
    return chunks


def sharing(state: Mapping[str, Tensor]) -> list[list[str]]:
    """For each key of a state dict: the keys that share its tensor, itself among them, in order."""
    groups: dict[object, list[str]] = {}
    keys = []
    for name, tensor in state.items():
        key: object = name
        if (
            isinstance(tensor, Tensor)
            and not is_lazy(tensor)
            and tensor.layout == torch.strided
            and tensor.numel()
            and not tensor.is_meta
        ):
            key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        groups.setdefault(key, []).append(name)
        keys.append(key)
    return [groups[key] for key in keys]


def raw_bytes(tensor: Tensor) -> Bytes:
    """Bytes of a contiguous tensor on the CPU, uint8 of shape [numel, bytes of a number]."""
    array: Bytes = tensor.reshape(-1).view(torch.uint8).numpy().reshape(-1, tensor.element_size())
    return array


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Equal values (a negative zero equals a zero) or equal bits (NaN), of one dtype and shape."""
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = one.detach().cpu().contiguous(), other.detach().cpu().contiguous()
    return bool((raw_bytes(one) == raw_bytes(other)).all()) or torch.equal(one, other)


def check_unfolded(entries: Sequence[Entry], size: int, source: str) -> None:
    """Refuse what would unfold to far more than a file of `size` bytes has a reason to hold."""
    needed = sum(entry.numel * entry.dtype.itemsize for entry in entries if entry.alias is None)
    if needed > max(_FLOOR, _RATIO * size):
        raise ArtifactError(
            f"{source} declares {needed} bytes of tensors: expected at most {max(_FLOOR, _RATIO * size)} in a packed "
            f"file of {size}; it is damaged or forged, or a model of nearly nothing but zeros: split that one"
        )


def few(names: Sequence[str]) -> str:
    """List the first four names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
