"""Channels that go as a whole: which are coupled, what each is worth, which go, and the smaller module without them."""

from lightning_xai_compress.structure.channels import ChannelGroup, ChannelSlice, channel_mask, kept_entries
from lightning_xai_compress.structure.cost import Cost, Measure, macs_of
from lightning_xai_compress.structure.dependencies import find_channels, flattened_otherwise
from lightning_xai_compress.structure.importance import (
    CHANNEL_SCORES,
    ChannelScore,
    channel_scores,
    check_channel_score,
)
from lightning_xai_compress.structure.selection import select_channels
from lightning_xai_compress.structure.shrinking import (
    Kept,
    shrunk,
    shrunk_plan,
    shrunk_scores,
    shrunk_weights,
)
from lightning_xai_compress.structure.trial import undisturbed, unlike

__all__ = [
    "CHANNEL_SCORES",
    "ChannelGroup",
    "ChannelScore",
    "ChannelSlice",
    "Cost",
    "Kept",
    "Measure",
    "channel_mask",
    "channel_scores",
    "check_channel_score",
    "find_channels",
    "flattened_otherwise",
    "kept_entries",
    "macs_of",
    "select_channels",
    "shrunk",
    "shrunk_plan",
    "shrunk_scores",
    "shrunk_weights",
    "undisturbed",
    "unlike",
]
