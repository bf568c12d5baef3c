"""Scores in, mask out: how far to prune when, and which weights go."""

from lightning_xai_compress.pruning.choice import Choice, Normalization, Scope, matching
from lightning_xai_compress.pruning.packed import PackedMasks
from lightning_xai_compress.pruning.schedule import SCHEDULES, Schedule, cubic, linear, one_shot, ramp, stepwise
from lightning_xai_compress.pruning.selection import (
    WORSE_THAN_RANDOM,
    Selection,
    SelectionRule,
    check_rule,
    nonpositive_share,
    prunable,
    select_mask,
)

__all__ = [
    "SCHEDULES",
    "WORSE_THAN_RANDOM",
    "Choice",
    "Normalization",
    "PackedMasks",
    "Schedule",
    "Scope",
    "Selection",
    "SelectionRule",
    "check_rule",
    "cubic",
    "linear",
    "matching",
    "nonpositive_share",
    "one_shot",
    "prunable",
    "ramp",
    "select_mask",
    "stepwise",
]
