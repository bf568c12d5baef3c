"""Attention heads as channels: rows of queries, keys and values, and the columns of what reads them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lightning_xai_compress.sizes import attention_of
from lightning_xai_compress.structure.channels import ChannelGroup, ChannelSlice

__all__ = ["find_heads", "overlaps"]


def find_heads(model: nn.Module, layers: Collection[str]) -> list[ChannelGroup]:
    """Find the heads of attention modules that are written out in Linear layers.

    Args:
        model: Any module.
        layers: Names of the weights that may be masked.
    """
    found = []
    for name, module in model.named_modules():
        parts = attention_of(module)
        if parts is None or parts.heads < 2:
            continue
        weights = [f"{name}.{leaf}.weight".removeprefix(".") for leaf in (*parts.makers, parts.reader)]
        if not set(weights) <= set(layers):
            continue
        width = parts.heads * parts.size
        rows = torch.arange(width).view(parts.heads, parts.size)
        index = torch.cat([rows + at * width for at in range(3)], dim=1) if len(parts.makers) == 1 else rows
        slices: list[ChannelSlice] = []
        for leaf, weight in zip(parts.makers, weights, strict=False):
            slices.append(ChannelSlice(weight, 0, index, makes=True))
            if module.get_submodule(leaf).bias is not None:
                slices.append(ChannelSlice(f"{weight.removesuffix('weight')}bias", 0, index))
        slices.append(ChannelSlice(weights[-1], 1, rows))
        found.append(ChannelGroup(weights[0], tuple(slices)))
    return found


def overlaps(group: ChannelGroup, others: Collection[ChannelGroup]) -> bool:
    """Whether a group takes from the same side of a weight as one of the others."""
    taken = {(part.name, part.axis) for each in others for part in each.slices}
    return any((part.name, part.axis) in taken for part in group.slices)
