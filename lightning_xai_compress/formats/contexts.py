"""Which rows of a model share a table of frequencies, and the tables.

A context is a bit width and a table. Rows of all layers that look alike share one: they are grouped as in
k-means, with the bits that a row takes under a table as the distance, and in the number of groups that makes codes,
tables and group labels together shortest.

A table holds a level for each symbol, or for groups of neighbouring symbols: a frequency on a scale of eight steps an
octave. Frequencies are integers below 2^53 in float64, so that encoder and decoder agree on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BITMAP",
    "LEVELS",
    "MODES",
    "WIDTHS",
    "Floats",
    "Ints",
    "costs",
    "frequencies",
    "level_count",
    "lowest",
    "plan_contexts",
    "row_histograms",
    "table_bits",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BITMAP = 1  # the "width" of rows of zeros and ones
WIDTHS = range(BITMAP, 9)
LEVELS = 161  # 0: the symbol does not occur; else 1 + 8 * octave + step
# How symbols share levels: whether both signs are apart, and how many bits below its leading one a magnitude keeps.
MODES = ((True, 8), (False, 8), (True, 2), (False, 2), (False, 1))

_STEPS = (65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194)  # 2^(16 + i/8)
_CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # numbers of contexts that are tried for each width
_ROUNDS = 6  # of regrouping rows
_ABSENT_BITS = 24.0  # what a symbol costs that its table does not know


def lowest(width: int) -> int:
    """Give the smallest symbol of a width: -(2^(width-1) - 1), or 0 in a bitmap."""
    return 0 if width == BITMAP else 1 - (1 << (width - 1))


@cache
def _bins(width: int, mode: int) -> Ints:
    """Which level each symbol of a width uses, int64 of shape [symbols], counted from 0 in the order of the symbols."""
    if width == BITMAP:
        return np.arange(2)
    signed, kept = MODES[mode]
    top = -lowest(width)
    keys = []
    for value in range(-top, top + 1):
        shift = max(0, abs(value).bit_length() - 1 - kept)
        # The largest magnitude, where clipped weights gather, stands alone.
        key = 1 << 16 if abs(value) == top else (shift << 9) + (abs(value) >> shift)
        keys.append(-key if signed and value < 0 else key)
    inverse: Ints = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    inverse.setflags(write=False)  # it is kept
    return inverse


def level_count(width: int, mode: int) -> int:
    """Give the number of levels in a table."""
    return int(_bins(width, mode).max()) + 1


def frequencies(levels: Ints, width: int, mode: int) -> Floats:
    """Turn levels [..., levels] into integer frequencies, float64 of shape [..., symbols]."""
    octave, step = np.divmod(np.maximum(levels, 1) - 1, len(_STEPS))
    each = np.where(levels > 0, np.asarray(_STEPS, np.int64)[step] << octave, 0).astype(np.float64)
    if not each.any(-1).all():
        raise ValueError("an empty table")
    return each[..., _bins(width, mode)]


def _levels(histograms: Floats, width: int, mode: int) -> Ints:
    bins = _bins(width, mode)
    members = (bins[:, None] == np.arange(level_count(width, mode))).astype(np.float64)
    density = histograms @ members / members.sum(0)
    with np.errstate(divide="ignore"):
        below = np.rint(len(_STEPS) * np.log2(density / density.max(-1, keepdims=True)))
    return np.where(density > 0, np.clip(LEVELS - 1 + below, 1, None), 0).astype(np.int64)


def costs(frequency: Floats) -> Floats:
    """Bits of each symbol [..., symbols], in whole 1024ths: sums are exact, so that every machine chooses alike."""
    with np.errstate(divide="ignore"):
        bits = -np.log2(frequency / frequency.sum(-1, keepdims=True))
    rounded: Floats = np.rint(np.minimum(bits, _ABSENT_BITS) * 1024) / 1024
    return rounded


def table_bits(levels: Ints) -> Floats:
    """About what tables [..., levels] take, in whole bits."""
    steps = np.abs(np.diff(levels, prepend=LEVELS - 1))
    bits: Floats = np.rint((2 + 2 * np.log2(1 + np.minimum(steps, LEVELS - steps))).sum(-1))
    return bits


def plan_contexts(
    blocks: Sequence[tuple[NDArray[np.int8], NDArray[np.uint8]]],
) -> tuple[list[tuple[int, int]], list[Ints], list[Ints]]:
    """Group all rows into contexts; give width and mode, and levels of each, and the contexts of each block's rows."""
    widths = np.concatenate([np.empty(0, np.uint8), *(widths for _, widths in blocks)])
    labels = np.zeros(len(widths), np.int64)
    contexts: list[tuple[int, int]] = []
    tables: list[Ints] = []
    for width in WIDTHS:
        rows = np.flatnonzero(widths == width)
        if not len(rows):
            continue
        histograms = np.concatenate([row_histograms(values[own == width], width) for values, own in blocks])
        chosen = _group(histograms, width)
        labels[rows] = chosen + len(contexts)
        modes, levels, _ = _tables(_sums(histograms, chosen), width)
        contexts += [(width, int(mode)) for mode in modes]
        tables += [levels[mode][label] for label, mode in enumerate(modes)]
    ends = np.cumsum([len(own) for _, own in blocks])
    return contexts, tables, np.split(labels, ends[:-1]) if blocks else []


def row_histograms(values: NDArray[np.int8], width: int) -> Floats:
    """Count the symbols of each row, shape [rows, symbols]."""
    symbols = 2 if width == BITMAP else (1 << width) - 1
    counts = np.zeros((len(values), symbols))
    for row, count in zip(values, counts, strict=True):
        count[:] = np.bincount(row.astype(np.int64) - lowest(width), minlength=symbols)
    return counts


def _sums(histograms: Floats, labels: Ints) -> Floats:
    """Histograms of groups, shape [groups, symbols]."""
    members = (labels == np.arange(labels.max() + 1)[:, None]).astype(np.float64)
    sums: Floats = members @ histograms
    return sums


def _tables(histograms: Floats, width: int) -> tuple[Ints, list[Ints], Floats]:
    """Choose the mode that costs each group least, its table included.

    Returns:
        The modes [groups], levels [groups, levels] of each mode, and the groups' bits [groups].
    """
    modes = range(1 if width == BITMAP else len(MODES))
    levels = [_levels(histograms, width, mode) for mode in modes]
    bits = np.stack(
        [
            (histograms * costs(frequencies(each, width, mode))).sum(1) + table_bits(each)
            for mode, each in zip(modes, levels, strict=True)
        ]
    )
    return bits.argmin(0), levels, bits.min(0)


def _group(histograms: Floats, width: int) -> Ints:
    """Group rows by their histograms, in the number of groups that costs least; labels 0.. of shape [rows]."""
    zeros = histograms[:, -lowest(width)]
    density = 1 - zeros / np.maximum(histograms.sum(1), 1)
    best, least = np.zeros(len(histograms), np.int64), np.inf
    for groups in _CANDIDATES:
        if groups > max(1, len(histograms) // 2):
            break
        order = np.argsort(density, kind="stable")
        labels = np.empty(len(order), np.int64)
        labels[order] = np.arange(len(order)) * groups // len(order)
        if groups > 1 and not density.all():
            labels = np.where(density > 0, np.maximum(labels, 1), 0)
        labels = _without_gaps(labels)
        for _ in range(_ROUNDS if groups > 1 else 0):
            before, labels = labels, _without_gaps(_distances(histograms, labels).argmin(1))
            if np.array_equal(before, labels):
                break
        sizes = np.bincount(labels)
        bits = float(_tables(_sums(histograms, labels), width)[2].sum())
        bits += float(np.rint(-(sizes * np.log2(sizes / sizes.sum())).sum()))
        if bits < least:
            best, least = labels, bits
    return best


def _without_gaps(labels: Ints) -> Ints:
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _distances(histograms: Floats, labels: Ints) -> Floats:
    """Bits that every row would take in each group, the label included, of shape [rows, groups]."""
    own = _sums(histograms, labels)
    smooth = np.where((own > 0).sum(1, keepdims=True) == 1, own, own * 64 + 1)
    label_bits = -np.rint(1024 * np.log2(np.bincount(labels) / len(labels))) / 1024
    distance: Floats = histograms @ costs(smooth).T + label_bits
    return distance
