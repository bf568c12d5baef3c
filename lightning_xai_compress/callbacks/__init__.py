"""The callbacks: the only room that knows Lightning. They say when; the other rooms say what."""

from lightning_xai_compress.callbacks.accuracy_budget import AccuracyBudget
from lightning_xai_compress.callbacks.budget import SizeBudget
from lightning_xai_compress.callbacks.channels import ChannelPruning, Channels
from lightning_xai_compress.callbacks.compress import XAICompression
from lightning_xai_compress.callbacks.distillation import DenseTeacher, Distillation
from lightning_xai_compress.callbacks.export import CompressedExport
from lightning_xai_compress.callbacks.precision import MixedPrecision, Quantization
from lightning_xai_compress.callbacks.pruning import Pruning, RelevancePruning
from lightning_xai_compress.callbacks.scoring import RelevanceScoring
from lightning_xai_compress.callbacks.stage import Scoring

__all__ = [
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
]
