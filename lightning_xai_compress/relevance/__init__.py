"""The relevance engine: how much each weight contributes to what the model decides."""

from lightning_xai_compress.relevance.attention import AttentionRule, check_attention
from lightning_xai_compress.relevance.baselines import Baseline, BaselineName, check_baseline, mean_inputs
from lightning_xai_compress.relevance.batchnorm import forward, tracked_norms, update_batchnorm
from lightning_xai_compress.relevance.calls import call_order
from lightning_xai_compress.relevance.composites import COMPOSITE_NAMES, check_composite
from lightning_xai_compress.relevance.ends import Ends, known_names
from lightning_xai_compress.relevance.engine import Propagation, relevance_sums
from lightning_xai_compress.relevance.explain import Explain, call_model, check_explain, find_logits, split_batch
from lightning_xai_compress.relevance.heatmaps import is_picture, save_heatmaps
from lightning_xai_compress.relevance.isolation import evaluation, isolated, unwrapped
from lightning_xai_compress.relevance.norms import input_norms
from lightning_xai_compress.relevance.statistics import (
    LEAST_BATCHES,
    STATISTICS,
    Processes,
    RelevanceSums,
    Statistic,
    check_statistics,
)

__all__ = [
    "COMPOSITE_NAMES",
    "LEAST_BATCHES",
    "STATISTICS",
    "AttentionRule",
    "Baseline",
    "BaselineName",
    "Ends",
    "Explain",
    "Processes",
    "Propagation",
    "RelevanceSums",
    "Statistic",
    "call_model",
    "call_order",
    "check_attention",
    "check_baseline",
    "check_composite",
    "check_explain",
    "check_statistics",
    "evaluation",
    "find_logits",
    "forward",
    "input_norms",
    "is_picture",
    "isolated",
    "known_names",
    "mean_inputs",
    "relevance_sums",
    "save_heatmaps",
    "split_batch",
    "tracked_norms",
    "unwrapped",
    "update_batchnorm",
]
