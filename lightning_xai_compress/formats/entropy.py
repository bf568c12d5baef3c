"""Small integers in and out of one ANS stream, close to their entropy (or below it, where channels differ).

Every row of every block belongs to one context (see `contexts`): a bit width and a table of frequencies. What is short
and has no table (the tables themselves, which context a row has, the scales) is coded adaptively: encoder and decoder
count the symbols seen so far. docs/packed-format.md gives the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from lightning_xai_compress.formats.contexts import (
    BITMAP,
    LEVELS,
    MODES,
    WIDTHS,
    Floats,
    Ints,
    costs,
    frequencies,
    level_count,
    lowest,
    plan_contexts,
)

AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical

__all__ = ["BITMAP", "Block", "Encoded", "Header", "decode", "encode"]

_LOW_BITS = 4  # of a scale, stored as they are
_PIECE = 1 << 18  # symbols that are decoded at a time: the coder gives 4 bytes each
_MAX_CONTEXTS = 256
_MAX_SCALES = 1 << 12


@dataclass(frozen=True)
class Block:
    """The integers of one tensor.

    Args:
        values: int8 of shape [rows, columns], in +-(2^(width-1) - 1), or 0 and 1 in rows of width `BITMAP`.
        widths: uint8 of shape [rows], in 1..8.
        scales: uint16 of shape [rows], the bit patterns of finite bfloat16 values >= 0; None for a block without.
            Only those of rows with a value other than zero are stored.
        bits: What a decoded block took of the stream, without the tables.
    """

    values: NDArray[np.int8]
    widths: NDArray[np.uint8]
    scales: NDArray[np.uint16] | None = None
    bits: int = 0


@dataclass(frozen=True)
class Header:
    """What the decoder must know beside the shapes.

    Args:
        contexts: Width (1..8) and mode (0..4) of each context.
        scales: Smallest coarse scale, and how many different ones there can be.
    """

    contexts: tuple[tuple[int, int], ...]
    scales: tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """A stream, and where its bits went.

    Args:
        words: uint32 of shape [words].
        header: What the decoder must know.
        code_bits: Of each block: its values, the contexts of its rows, and by these bits its share of the tables.
        scale_bits: Of each block.
    """

    words: NDArray[np.uint32]
    header: Header
    code_bits: tuple[float, ...]
    scale_bits: tuple[float, ...]


class _Counts:
    """An adaptive model: every symbol starts with a weight and gains as it is seen; what is old can be faded."""

    def __init__(self, start: Floats, gain: int) -> None:
        self.start, self.gain, self.now = start, gain, start.copy()

    def see(self, symbol: int) -> None:
        self.now[symbol] += self.gain

    def fade(self) -> None:
        self.now = self.start + np.floor((self.now - self.start) / 4)


class _Models:
    """The adaptive models of a stream, in the state in which coding starts."""

    def __init__(self, header: Header) -> None:
        distance = np.minimum(np.arange(LEVELS), LEVELS - np.arange(LEVELS))
        self.levels = _Counts(np.floor(512.0 / (2 + distance)) + 1, 64)
        # The coder wants at least two symbols.
        self.contexts = _Counts(np.ones(max(2, len(header.contexts))), 4)
        self.scales = _Counts(np.ones(max(2, header.scales[1])), 4)
        self.low = Categorical(np.ones(1 << _LOW_BITS), perfect=False)


class _Writer:
    """Collects symbols in the order in which they are decoded; ANS is a stack and wants them backwards."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.int32], Any, Floats | None]] = []

    def static(self, symbols: NDArray[Any], model: Any) -> None:
        if symbols.size:
            self._parts.append((symbols.astype(np.int32), model, None))

    def adaptive(self, symbols: Sequence[int] | NDArray[Any], counts: _Counts) -> float:
        """Code symbols one by one; return the bits that they take."""
        if not len(symbols):
            return 0.0
        rows = np.empty((len(symbols), len(counts.now)))
        for row, symbol in zip(rows, symbols, strict=True):
            row[:] = counts.now
            counts.see(int(symbol))
        array = np.asarray(symbols, np.int32)
        self._parts.append((array, Categorical(perfect=False), rows))
        return float(-np.log2(rows[np.arange(len(array)), array] / rows.sum(1)).sum())

    def finish(self) -> NDArray[np.uint32]:
        coder = AnsCoder()
        for symbols, model, rows in reversed(self._parts):
            coder.encode_reverse(symbols, model, *(() if rows is None else (rows,)))
        words: NDArray[np.uint32] = coder.get_compressed()
        return words


class _Reader:
    def __init__(self, words: NDArray[np.uint32]) -> None:
        self.coder = AnsCoder(words)

    def static(self, count: int, model: Any) -> NDArray[np.int32]:
        symbols: NDArray[np.int32] = self.coder.decode(model, count) if count else np.empty(0, np.int32)
        return symbols

    def small(self, count: int, model: Any, lowest: int) -> NDArray[np.int8]:
        """Decode symbols that count from `lowest`."""
        values = np.empty(count, np.int8)
        for start in range(0, count, _PIECE):
            piece = values[start : start + _PIECE]
            piece[:] = self.static(len(piece), model)
            piece += np.int8(lowest)
        return values

    def adaptive(self, count: int, counts: _Counts) -> Ints:
        symbols = np.empty(count, np.int64)
        for i in range(count):
            symbols[i] = self.coder.decode(Categorical(counts.now, lazy=True))
            counts.see(int(symbols[i]))
        return symbols


def encode(blocks: Sequence[Block]) -> Encoded:
    """Code blocks of integers into one stream; equal blocks give equal bytes.

    Raises:
        ValueError: A width outside 1..8, or values outside the width of their row.
    """
    for block in blocks:
        if not np.isin(block.widths, WIDTHS).all():
            raise ValueError(f"widths must lie in 1..8, got {np.unique(block.widths)}")
        low = 1 - (1 << (block.widths.astype(np.int64) - 1))[:, None]
        if not ((block.values >= low) & (block.values <= np.maximum(-low, 1))).all():
            raise ValueError("codes must lie within +-(2^(width-1) - 1)")
    contexts, tables, labels = plan_contexts([(block.values, block.widths) for block in blocks])
    coarse = [_coarse(block) for block in blocks]
    known = np.concatenate([np.empty(0, np.int64), *(c >> _LOW_BITS for c in coarse)])
    first = int(known.min()) if known.size else 0
    header = Header(tuple(contexts), (first, int(known.max()) - first + 1 if known.size else 1))

    writer, models = _Writer(), _Models(header)
    table_bits = []
    for levels in tables:
        steps = np.diff(levels, prepend=LEVELS - 1) % LEVELS
        table_bits.append(writer.adaptive(steps, models.levels))
    weights = [frequencies(levels, *context) for levels, context in zip(tables, contexts, strict=True)]
    coders = [Categorical(weight, perfect=False) for weight in weights]
    prices = [costs(weight) for weight in weights]

    code_bits, scale_bits = [], []
    for block, label, scales in zip(blocks, labels, coarse, strict=True):
        bits = writer.adaptive(label, models.contexts)
        models.contexts.fade()
        for context in np.unique(label):
            symbols = block.values[label == context].reshape(-1).astype(np.int64) - lowest(contexts[context][0])
            writer.static(symbols, coders[context])
            bits += float(prices[context][symbols].sum())
        code_bits.append(bits)
        bits = writer.adaptive((scales >> _LOW_BITS) - first, models.scales)
        if block.scales is not None:
            models.scales.fade()
        writer.static(scales & ((1 << _LOW_BITS) - 1), models.low)
        scale_bits.append(bits + _LOW_BITS * len(scales))
    told = np.asarray(code_bits) + 1e-6
    shares = sum(table_bits) * told / told.sum() if blocks else np.empty(0)
    total_bits = tuple(float(bits + share) for bits, share in zip(code_bits, shares, strict=True))
    return Encoded(writer.finish(), header, total_bits, tuple(scale_bits))


def decode(words: NDArray[np.uint32], header: Header, shapes: Sequence[tuple[int, int, bool]]) -> Iterator[Block]:
    """Give the blocks back one by one: each is made when it is asked for.

    Args:
        words: The stream.
        header: As `encode` gave it.
        shapes: Rows, columns and whether there are scales, of each block.

    Raises:
        ValueError: The header or the stream is damaged. Damage that leaves a stream decodable is found at its end, or
            not at all: check a digest first.
    """
    _check_header(header)
    reader, models = _Reader(words), _Models(header)
    del words  # the coder has its own copy
    coders = []
    for width, mode in header.contexts:
        steps = reader.adaptive(level_count(width, mode), models.levels)
        levels = (np.cumsum(steps) + LEVELS - 1) % LEVELS
        coders.append(Categorical(frequencies(levels, width, mode), perfect=False))
    for shape in shapes:
        yield _read_block(reader, models, header, coders, *shape)
    if not reader.coder.is_empty():
        raise ValueError("the stream holds more than its index says")


def _read_block(
    reader: _Reader, models: _Models, header: Header, coders: Sequence[Any], rows: int, columns: int, scaled: bool
) -> Block:
    if rows and not coders:
        raise ValueError("codes without a context")
    before = reader.coder.num_valid_bits()
    label = reader.adaptive(rows, models.contexts)
    models.contexts.fade()
    widths = np.array([width for width, _ in header.contexts], np.uint8)[label]
    values = np.empty((rows, columns), np.int8)
    for context in np.unique(label):
        chosen = label == context
        symbols = reader.small(int(chosen.sum()) * columns, coders[context], lowest(header.contexts[context][0]))
        values[chosen] = symbols.reshape(-1, columns)
        del symbols  # before the next ones are made
    scales = _read_scales(reader, models, header, values, widths) if scaled else None
    return Block(values, widths, scales, before - reader.coder.num_valid_bits())


def _check_header(header: Header) -> None:
    for width, mode in header.contexts:
        if width not in WIDTHS or not 0 <= mode < len(MODES):
            raise ValueError(f"context of width {width} and mode {mode}")
    first, count = header.scales
    if len(header.contexts) > _MAX_CONTEXTS or not 0 <= first < _MAX_SCALES or not 1 <= count <= _MAX_SCALES:
        raise ValueError(f"{len(header.contexts)} contexts, {count} scales from {first}")


def _coarse(block: Block) -> Ints:
    """Give the scales of the rows that need one, times 2^width: they are then alike within a layer.

    The bits of a bfloat16, read as an integer, grow as its logarithm: 128 for each octave.
    """
    if block.scales is None:
        return np.empty(0, np.int64)
    live = block.values.any(1)
    return block.scales[live].astype(np.int64) + 128 * block.widths[live].astype(np.int64)


def _read_scales(
    reader: _Reader, models: _Models, header: Header, values: NDArray[np.int8], widths: NDArray[np.uint8]
) -> NDArray[np.uint16]:
    live = values.any(1)
    high = reader.adaptive(int(live.sum()), models.scales) + header.scales[0]
    models.scales.fade()
    pattern = (high << _LOW_BITS) + reader.static(len(high), models.low) - 128 * widths[live].astype(np.int64)
    if ((pattern < 0) | (pattern >= 0x7F80)).any():
        raise ValueError("a scale is negative or not finite")
    scales = np.zeros(len(values), np.uint16)
    scales[live] = pattern
    return scales
