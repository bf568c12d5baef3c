"""What rows of integer codes would take in a packed file, before anything is packed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_xai_compress.formats.contexts import costs, frequencies, plan_contexts, row_histograms, table_bits

__all__ = ["entropy_price"]


def entropy_price(codes: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Estimate the entropy-coded bits of every row, if all rows had this width.

    The rows are grouped as the packed file groups them. A row takes its symbols by the table of its group, the label
    of that group, and by these a share of the table. A file of several widths has smaller groups: its rows take
    somewhat more. Scales, which take about a byte a row at every width, are not counted. To be used as `price` of
    `measure_widths`.

    Args:
        codes: int8 of shape [rows, columns] by parameter name, in +-(2^(width-1) - 1).
        width: 2..8.

    Returns:
        Bits, float64 of shape [rows] on the CPU, by parameter name.
    """
    values = {name: each.detach().cpu().numpy() for name, each in codes.items()}
    blocks = [(each, np.full(len(each), width, np.uint8)) for each in values.values()]
    contexts, tables, labels = plan_contexts(blocks)
    total = np.bincount(np.concatenate([*labels, np.empty(0, np.int64)]), minlength=len(contexts))
    symbols = [costs(frequencies(levels, *context)) for levels, context in zip(tables, contexts, strict=True)]
    bits = {name: np.zeros(len(each)) for name, each in values.items()}
    for context, levels in enumerate(tables):
        members = [own == context for own in labels]
        for own, name in zip(members, values, strict=True):
            bits[name][own] = row_histograms(values[name][own], width) @ symbols[context]
        each = table_bits(levels) / total[context] - np.log2(total[context] / total.sum())
        for own, name in zip(members, values, strict=True):
            bits[name][own] += each
    return {name: torch.from_numpy(each) for name, each in bits.items()}
