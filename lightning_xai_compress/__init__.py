"""PyTorch Lightning callbacks that compress a network by what its decisions rest on.

Names are resolved lazily: `from lightning_xai_compress import load_compressed` needs torch, numpy and constriction
alone, so that it runs on the machine that deploys.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_xai_compress.callbacks import (
        AccuracyBudget,
        ChannelPruning,
        Channels,
        CompressedExport,
        DenseTeacher,
        Distillation,
        MixedPrecision,
        Pruning,
        Quantization,
        RelevancePruning,
        RelevanceScoring,
        Scoring,
        SizeBudget,
        XAICompression,
    )
    from lightning_xai_compress.compression import Compressed, compress
    from lightning_xai_compress.criteria import score
    from lightning_xai_compress.errors import (
        ArtifactError,
        BudgetError,
        CompressionError,
        LatentCopyError,
        RelevanceError,
    )
    from lightning_xai_compress.formats import Files, Inputs, load_compressed, save
    from lightning_xai_compress.plan import BitAllocation, CompressionPlan, HeatMaps, Mask, ScoreMap
    from lightning_xai_compress.pruning import Choice, select_mask
    from lightning_xai_compress.quantization import allocate_bits
    from lightning_xai_compress.relevance import save_heatmaps
    from lightning_xai_compress.report import Report

__all__ = [
    "AccuracyBudget",
    "ArtifactError",
    "BitAllocation",
    "BudgetError",
    "ChannelPruning",
    "Channels",
    "Choice",
    "Compressed",
    "CompressedExport",
    "CompressionError",
    "CompressionPlan",
    "DenseTeacher",
    "Distillation",
    "Files",
    "HeatMaps",
    "Inputs",
    "LatentCopyError",
    "Mask",
    "MixedPrecision",
    "Pruning",
    "Quantization",
    "RelevanceError",
    "RelevancePruning",
    "RelevanceScoring",
    "Report",
    "ScoreMap",
    "Scoring",
    "SizeBudget",
    "XAICompression",
    "allocate_bits",
    "compress",
    "load_compressed",
    "save",
    "save_heatmaps",
    "score",
    "select_mask",
]

__version__ = "0.1.0"

_ROOMS = {
    "callbacks": (
        "AccuracyBudget",
        "ChannelPruning",
        "Channels",
        "CompressedExport",
        "DenseTeacher",
        "Distillation",
        "MixedPrecision",
        "Pruning",
        "Quantization",
        "RelevancePruning",
        "RelevanceScoring",
        "Scoring",
        "SizeBudget",
        "XAICompression",
    ),
    "compression": ("Compressed", "compress"),
    "criteria": ("score",),
    "errors": ("ArtifactError", "BudgetError", "CompressionError", "LatentCopyError", "RelevanceError"),
    "formats": ("Files", "Inputs", "load_compressed", "save"),
    "plan": ("BitAllocation", "CompressionPlan", "HeatMaps", "Mask", "ScoreMap"),
    "pruning": ("Choice", "select_mask"),
    "quantization": ("allocate_bits",),
    "relevance": ("save_heatmaps",),
    "report": ("Report",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
