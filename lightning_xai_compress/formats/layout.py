"""What writer and reader of a packed file share: the list of tensors, and the order of their bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.container import Bytes

__all__ = [
    "BITMAP",
    "CODES",
    "CODE_DTYPES",
    "DTYPES",
    "HALF_DTYPES",
    "RAW",
    "Entry",
    "check_unfolded",
    "chunks",
    "few",
    "fit_name",
    "has_memory",
    "is_plain",
    "raw_bytes",
    "read_codebook",
    "same",
    "sharing",
    "write_codebook",
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
HALF_DTYPES = (torch.float32, torch.float64)  # that take less room as float16, where it holds them
_CHUNK = 1 << 22  # bytes of `rest` that share byte planes
# What any file may unfold to, and for a larger one what each of its bytes may: weights in bytes, rows of coded tensors.
_BYTES, _BYTES_EACH = 1 << 26, 1 << 10
_ROWS, _ROWS_EACH = 1 << 16, 1 << 4
_LONGEST_NAME = 1024
# Path separators, control characters, and halves of characters, which UTF-8 cannot hold.
_UNFIT = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Entry:
    """One key of the state dict.

    Args:
        name: The key.
        dtype: Of the tensor.
        shape: Of the tensor.
        kind: How it is stored.
        alias: Position of an earlier key that shares its tensor.
        half: Whether its numbers in `rest` are float16, which holds them exactly.
        groups: Of input channels in each output channel, each with a width and a scale of its own.
        codebooks: Values that the weights of each block of channels share, each exact in bfloat16; none where there is
            a grid.
    """

    name: str
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()
    kind: int = RAW
    alias: int | None = None
    half: bool = False
    groups: int = 1
    codebooks: tuple[tuple[float, ...], ...] = ()

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def raw(self) -> bool:
        """Whether numbers of it are in `rest`."""
        return self.alias is None and self.kind != CODES

    @property
    def held(self) -> torch.dtype:
        """Dtype of its numbers in `rest`."""
        return torch.float16 if self.half else self.dtype

    @property
    def rows(self) -> int:
        """Number of rows in the stream."""
        return self.shape[0] * self.groups

    @property
    def block(self) -> tuple[int, int, bool]:
        """Rows, columns and whether there are scales."""
        return self.rows, self.numel // self.rows, self.kind == CODES


def chunks(counts: Sequence[tuple[Entry, int]]) -> Iterator[tuple[int, list[tuple[Entry, int, int]]]]:
    """Cut the numbers in `rest` into chunks that share byte planes.

    All numbers of one dtype are a row, the same parameters of all layers side by side, and the row is cut into pieces
    of 4 MiB: small tensors share a chunk, and no reader needs more room than that.

    Args:
        counts: Tensors in the order of the index, and how many numbers of each are in `rest`.

    Yields:
        Bytes of a number; and what the chunk holds: a tensor, and from which to which of its numbers.
    """
    ordered = sorted(counts, key=lambda item: (str(item[0].held), item[0].name.rpartition(".")[2]))
    parts: list[tuple[Entry, int, int]] = []
    room = 0
    for entry, count in ordered:
        if parts and parts[-1][0].held != entry.held:
            yield parts[-1][0].held.itemsize, parts
            parts = []
        start = 0
        while start < count:
            if not parts:
                room = _CHUNK // entry.held.itemsize
            end = min(count, start + room)
            parts.append((entry, start, end))
            room -= end - start
            start = end
            if not room:
                yield entry.held.itemsize, parts
                parts = []
    if parts:
        yield parts[-1][0].held.itemsize, parts


def write_codebook(values: Sequence[float]) -> str:
    """A codebook as text: four hexadecimal digits a number (bfloat16), first those after zero, then those before it."""
    zero = len(values) // 2
    patterns = torch.tensor([*values[zero + 1 :], *values[:zero]]).to(torch.bfloat16).view(torch.int16)
    return "".join(f"{pattern & 0xFFFF:04x}" for pattern in patterns.tolist())


def read_codebook(text: object) -> tuple[float, ...]:
    """Undo `write_codebook`.

    Raises:
        ValueError: No such text, or numbers that do not rise through zero.
    """
    if not isinstance(text, str) or len(text) % 8 or not 8 <= len(text) <= 4 * 254:
        raise ValueError("a codebook is no text of 2 to 254 numbers of four digits")
    patterns = torch.tensor([int(text[at : at + 4], 16) for at in range(0, len(text), 4)], dtype=torch.int32)
    values = patterns.to(torch.int16).view(torch.bfloat16).float()
    half = len(values) // 2
    table = torch.cat([values[half:], torch.zeros(1), values[:half]])
    if not torch.isfinite(table).all() or bool((table.diff() < 0).any()):
        raise ValueError("a codebook does not rise through zero")
    return tuple(table.tolist())


def fit_name(name: object) -> bool:
    """Whether a name may stand in a packed file: as those of a state dict do, and never like a path.

    That is: text of 1 to 1024 characters, no part between its dots empty, without `/`, `\\`, control characters and
    lone surrogates.
    """
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or _UNFIT.search(name):
        return False
    return all(name.split("."))


def is_plain(tensor: Tensor) -> bool:
    """Whether it is torch's own tensor, and none of a library's that holds something else, such as integers."""
    return not is_traceable_wrapper_subclass(tensor)


def has_memory(tensor: object) -> bool:
    """Whether values can be written into it: a dense tensor on a real device, none of its numbers twice in memory."""
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return False
    return not any(step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True))


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
    """Refuse what would unfold to far more than a file of `size` bytes has a reason to hold.

    Raises:
        ArtifactError: It would.
    """
    stored = [entry for entry in entries if entry.alias is None]
    needed = {
        "bytes of tensors": sum(entry.numel * entry.dtype.itemsize for entry in stored),
        "rows of coded tensors": sum(entry.rows for entry in stored if entry.kind != RAW),
    }
    allowed = max(_BYTES, _BYTES_EACH * size), max(_ROWS, _ROWS_EACH * size)
    for (what, count), most in zip(needed.items(), allowed, strict=True):
        if count > most:
            raise ArtifactError(
                f"{source} declares {_number(count)} {what}: expected at most {most} in a packed file of {size} bytes; "
                "it is damaged or forged, or a model of nearly nothing but zeros: split that one"
            )


def _number(count: int) -> str:
    """A forged file may multiply up to numbers that Python refuses to print."""
    return str(count) if count < 1 << 64 else "more than 2^64"


def few(names: Sequence[str]) -> str:
    """List the first four names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
