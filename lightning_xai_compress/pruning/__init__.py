"""Scores in, mask out: how far to prune when, and which weights go."""

from lightning_xai_compress.pruning.packed import PackedMasks
from lightning_xai_compress.pruning.schedule import cubic
from lightning_xai_compress.pruning.selection import Selection, SelectionRule, nonpositive_share, select_mask

__all__ = ["PackedMasks", "Selection", "SelectionRule", "cubic", "nonpositive_share", "select_mask"]
