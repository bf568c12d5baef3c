"""From the bytes of a packed file to its tensors, one at a time and in little more memory than they take."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import entropy
from lightning_xai_compress.formats.container import Bytes, Container, open_container, read_json
from lightning_xai_compress.formats.layout import (
    BITMAP,
    CODE_DTYPES,
    CODES,
    DTYPES,
    HALF_DTYPES,
    RAW,
    Entry,
    check_unfolded,
    chunks,
    fit_name,
    raw_bytes,
    read_codebook,
)
from lightning_xai_compress.formats.packed_planes import PlaneReader
from lightning_xai_compress.plan import look_up

__all__ = ["Decoded", "PackedFile", "decode", "open_packed", "reading"]

_BAD_BYTES = (
    *(ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError, MemoryError),
    zlib.error,
)
_PIECE = 1 << 18  # numbers that are converted at a time
_MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class PackedFile:
    """An open packed file: its container, its index, and the keys of the state dict."""

    container: Container
    index: dict[str, Any]
    entries: list[Entry]

    @property
    def source(self) -> str:
        """What to call it in errors."""
        return self.container.source

    @property
    def provenance(self) -> dict[str, Any]:
        """How the model was made; empty where the index does not say."""
        found = self.index.get("provenance")
        return found if isinstance(found, dict) else {}

    @property
    def stored(self) -> dict[str, str]:
        """For each key: the key under which its tensor stands, itself unless it is an alias."""
        return {
            entry.name: entry.name if entry.alias is None else self.entries[entry.alias].name for entry in self.entries
        }


@dataclass
class Decoded:
    """A stored tensor.

    Args:
        entry: What the index says.
        values: The tensor; of a quantized one that was asked for as integers, its codes, int8 of the same shape.
        widths: Bit width of each row of a quantized tensor, uint8 of shape [rows].
        scales: Step of each row of a quantized tensor, float32 of shape [rows].
        stream_bits: What it took of the stream.
        rest_bytes: What it took of the rest.
    """

    entry: Entry
    values: Tensor
    widths: NDArray[np.uint8] | None = None
    scales: Tensor | None = None
    stream_bits: float = 0.0
    rest_bytes: float = 0.0


@contextmanager
def open_packed(path: str | Path) -> Iterator[PackedFile]:
    """Open a packed file: all is checked that can be checked without decoding it.

    Raises:
        FileNotFoundError: No such file.
        ArtifactError: The file is damaged, cut short, of another version, or none of ours.
    """
    with open_container(path) as container:
        with reading(container.source):
            index = read_json(container.read("index"))
            entries = _read_entries(index["tensors"], container.version)
        check_unfolded(entries, container.size, container.source)
        yield PackedFile(container, index, entries)


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn whatever bad bytes lead to into one error.

    Raises:
        ArtifactError: Something else was raised inside.
    """
    try:
        yield
    except ArtifactError:
        raise
    except _BAD_BYTES as error:
        what = repr(f"{type(error).__name__}: {error}"[:200])[1:-1]
        raise ArtifactError(
            f"{source} is damaged: expected an index and a stream that agree, got {what}; copy it again, or export it "
            "again"
        ) from error


def decode(file: PackedFile, integers: Collection[str] = ()) -> dict[str, Decoded]:
    """Decode all stored tensors; an alias is none.

    Args:
        file: The file.
        integers: Names of quantized tensors that are wanted as codes.

    Raises:
        ArtifactError: Index and bytes do not agree.
    """
    with reading(file.source):
        made: dict[str, Decoded] = {}
        bitmaps: dict[str, _Bitmap] = {}
        in_stream = [entry for entry in file.entries if entry.alias is None and entry.kind != RAW]
        shapes = [entry.block for entry in in_stream]
        blocks = entropy.decode(_words(file.container), _header(file.index), shapes)
        for entry, block in zip(in_stream, blocks, strict=True):
            if ((block.widths == entropy.BITMAP) != (entry.kind == BITMAP)).any():
                raise ValueError(f"{entry.name} has rows of another kind")
            if entry.kind == CODES:
                made[entry.name] = _weight(entry, block, entry.name in integers)
            else:
                bitmaps[entry.name] = _Bitmap(block.values.reshape(-1) != 0)
                made[entry.name] = Decoded(entry, torch.zeros(entry.shape, dtype=entry.dtype), stream_bits=block.bits)
            del block  # or it would stay while the next one is decoded
        _read_rest(file, made, bitmaps)
        return made


def _words(container: Container) -> NDArray[np.uint32]:
    return np.frombuffer(container.read("stream"), "<u4").astype(np.uint32, copy=False)


def _header(index: dict[str, Any]) -> entropy.Header:
    contexts, scales = index["contexts"], index["scales"]
    if any(len(pair) != 2 or any(type(number) is not int for number in pair) for pair in [*contexts, scales]):
        raise ValueError("contexts and scales must be pairs of integers")
    return entropy.Header(tuple((width, mode) for width, mode in contexts), (scales[0], scales[1]))


def _weight(entry: Entry, block: entropy.Block, as_integers: bool) -> Decoded:
    assert block.scales is not None
    codes = torch.from_numpy(block.values)
    scales = torch.from_numpy(block.scales.view(np.int16)).view(torch.bfloat16).float()
    values = codes
    if entry.codebooks:
        values = _shared(entry, codes)
    elif not as_integers:
        values = torch.empty(codes.shape, dtype=entry.dtype)
        rows = max(1, _PIECE // codes.shape[1])
        for start in range(0, len(codes), rows):
            piece = slice(start, start + rows)
            values[piece] = codes[piece].float().mul_(scales[piece, None])
    return Decoded(entry, values.reshape(entry.shape), block.widths, scales, block.bits)


def _shared(entry: Entry, codes: Tensor) -> Tensor:
    """Values of codebooks, piece by piece."""
    count = len(entry.codebooks[0])
    if codes.numel() and int(codes.short().abs().max()) > count // 2:
        raise ValueError(f"{entry.name} has codes beyond its codebook of {count} values")
    values = torch.empty(codes.shape, dtype=entry.dtype)
    block = len(codes) // len(entry.codebooks)
    rows = max(1, _PIECE // codes.shape[1])
    for at, numbers in enumerate(torch.tensor(entry.codebooks)):
        for start in range(at * block, (at + 1) * block, rows):
            piece = slice(start, min(start + rows, (at + 1) * block))
            values[piece] = look_up(codes[piece], numbers[None]).to(entry.dtype)
    return values


class _Bitmap:
    """Which numbers of a tensor are in the rest; it puts them into their places, piece by piece."""

    def __init__(self, marked: NDArray[np.bool_]) -> None:
        self.ones = int(np.count_nonzero(marked))
        self._bits = np.packbits(marked)
        self._position = 0

    def put(self, tensor: Bytes, numbers: Bytes) -> None:
        """Put the next numbers: both uint8 of shape [numbers, bytes of a number]."""
        while len(numbers):
            first = self._position // 8 * 8
            marked = np.unpackbits(self._bits[first // 8 : (first + _PIECE) // 8])
            marked[: self._position - first] = 0
            spots = np.flatnonzero(marked)[: len(numbers)]
            tensor[first + spots] = numbers[: len(spots)]
            done = len(spots) == len(numbers)
            self._position = first + (int(spots[-1]) + 1 if done else len(marked))
            numbers = numbers[len(spots) :]


def _read_rest(file: PackedFile, made: dict[str, Decoded], bitmaps: dict[str, _Bitmap]) -> None:
    counts = []
    for entry in file.entries:
        if entry.raw:
            counts.append((entry, bitmaps[entry.name].ones if entry.kind == BITMAP else entry.numel))
            # Memory is taken when the first numbers come, not for what was declared alone.
            made.setdefault(entry.name, Decoded(entry, torch.empty(0, dtype=entry.dtype)))
    size = file.container.places["rest"][1]
    planes = PlaneReader(lambda start, length: file.container.read("rest", start, length), size, file.index["planes"])
    for itemsize, parts in chunks(counts):
        numbers, place = planes.next(sum(end - start for _, start, end in parts), itemsize)
        first = 0
        for entry, start, end in parts:
            values = _numbers(entry, numbers[first : first + end - start])
            first += end - start
            tensor = made[entry.name]
            tensor.rest_bytes += place * (end - start) / len(numbers)
            if not tensor.values.numel():
                tensor.values = torch.empty(entry.numel, dtype=entry.dtype)
            if entry.kind == BITMAP:
                bitmaps[entry.name].put(raw_bytes(tensor.values), values)
            else:
                raw_bytes(tensor.values)[start:end] = values
    planes.finish()
    for entry, _ in counts:
        made[entry.name].values = made[entry.name].values.reshape(entry.shape)


def _numbers(entry: Entry, stored: Bytes) -> Bytes:
    """Check numbers of the rest, and widen those that are held as float16."""
    if entry.dtype == torch.bool and (stored > 1).any():
        raise ValueError(f"{entry.name} holds truth values other than 0 and 1")
    if not entry.half:
        return stored
    return raw_bytes(torch.from_numpy(np.ascontiguousarray(stored)).view(torch.float16).to(entry.dtype))


def _read_entries(rows: list[list[Any]], version: int) -> list[Entry]:
    entries: list[Entry] = []
    for row in rows:
        name, *more = row
        if not fit_name(name):
            raise ValueError(f"{str(name)[:60]!r} is no name of a tensor, but empty, too long or like a path")
        if len(more) == 1:
            alias = more[0]
            if type(alias) is not int or not 0 <= alias < len(entries) or entries[alias].alias is not None:
                raise ValueError(f"{name} is an alias of nothing")
            first = entries[alias]
            entries.append(Entry(name, first.dtype, first.shape, alias=alias))
        else:
            entries.append(_read_entry(version, name, *more))
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError("names are not unique")
    return entries


def _read_entry(version: int, name: str, dtype: str, shape: list[int], kind: int, *more: object) -> Entry:
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name} has no shape of at most {_MAX_DIMENSIONS} dimensions")
    if any(type(length) is not int or not 0 <= length < 1 << 63 for length in shape):
        raise ValueError(f"{name} has shape {shape}")
    if type(kind) is not int or kind not in (RAW, CODES, BITMAP):
        raise ValueError(f"{name} has kind {kind}")
    codebooks: tuple[tuple[float, ...], ...] = ()
    if version > 2 and kind == CODES and more and isinstance(more[0], str | list):
        if len(more) > 1:
            raise ValueError(f"{name} has more beside its codebooks: {more[1:]}")
        codebooks, more = _codebooks(name, shape, more[0]), ()
    groups = _groups(name, shape, *more) if version > 1 and kind == CODES and more else 1
    held = more if groups == 1 else ()
    entry = Entry(name, DTYPES[dtype], tuple(shape), kind, half=bool(held), groups=groups, codebooks=codebooks)
    if kind != RAW and not (shape and entry.numel):
        raise ValueError(f"{name} of shape {shape} cannot be coded")
    if kind == CODES and entry.dtype not in CODE_DTYPES:
        raise ValueError(f"{name} of {dtype} cannot be coded")
    if held and (held != ("float16",) or kind == CODES or entry.dtype not in HALF_DTYPES):
        raise ValueError(f"{name} of {dtype} and kind {kind} cannot be held as {held}")
    return entry


def _codebooks(name: str, shape: list[int], texts: str | list[object]) -> tuple[tuple[float, ...], ...]:
    """One for the whole tensor, or as many as blocks of its channels."""
    if isinstance(texts, str):
        return (read_codebook(texts),)
    if len(texts) < 2 or not shape or shape[0] % len(texts):
        raise ValueError(f"{name} of shape {shape} has {len(texts)} codebooks")
    found = tuple(read_codebook(text) for text in texts)
    if len({len(each) for each in found}) > 1:
        raise ValueError(f"{name} has codebooks of different lengths")
    return found


def _groups(name: str, shape: list[int], groups: object) -> int:
    """Check how many groups the input channels (second dimension) of a weight are cut into."""
    if type(groups) is not int or len(shape) < 2 or not 2 <= groups <= shape[1] or shape[1] % groups:
        raise ValueError(f"{name} of shape {shape} cannot have {str(groups)[:60]} groups of input channels")
    return groups
