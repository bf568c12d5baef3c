"""The relevance engine: how much each weight contributes to what the model decides."""

from lightning_xai_compress.relevance.engine import evaluation, score
from lightning_xai_compress.relevance.explain import Explain, call_model, split_batch

__all__ = ["Explain", "call_model", "evaluation", "score", "split_batch"]
