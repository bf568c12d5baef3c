"""Multi-head attention taken apart into layers and an attention step, so that its projections get relevance."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_xai_compress.relevance.propagation import scale_relevance

__all__ = ["AttentionRule", "attend", "check_attention", "multi_head_attention"]

AttentionRule = Literal["attnlrp", "cp"]

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def check_attention(rule: str) -> None:
    """Refuse what is no such rule.

    Raises:
        ValueError: With the choices.
    """
    if rule not in get_args(AttentionRule):
        raise ValueError(f"attention must be 'attnlrp' or 'cp', got {rule!r}")


def attend(rule: AttentionRule | None, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Scaled dot-product attention.

    With "attnlrp" (Achtibat et al. 2024, eq. 13 and 15) each product of activations gives half of its relevance to
    either factor, and softmax its gradient: values get 1/2, queries and keys 1/4 each of what autograd gives. With
    "cp" (Ali et al. 2022) attention weights are constants and values get all.
    """
    if rule == "cp":
        query, key = query.detach(), key.detach()
    elif rule == "attnlrp":
        query, key, value = scale_relevance(query, 0.25), scale_relevance(key, 0.25), scale_relevance(value, 0.5)
    return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)


def multi_head_attention(
    linear: Callable[..., Tensor],
    rows: Callable[[Tensor, slice], Tensor],
    rule: AttentionRule | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` whose projections are calls of `linear`.

    Args:
        linear: Called as `linear(input, weight, bias)`.
        rows: Gives some rows of a weight, known under the name of the whole.
        rule: See `attend`.
        args, kwargs: As for `F.multi_head_attention_forward`.
    """
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    query, key, value = call["query"], call["key"], call["value"]
    heads, width = call["num_heads"], call["embed_dim_to_check"]
    batched = query.dim() == 3
    same = query is key is value
    if not batched:
        query, key, value = (each.unsqueeze(1) for each in (query, key, value))
    if same and rule != "cp" and not call["use_separate_proj_weight"]:
        q, k, v = linear(query, call["in_proj_weight"], call["in_proj_bias"]).chunk(3, -1)
    else:
        weights = [call["q_proj_weight"], call["k_proj_weight"], call["v_proj_weight"]]
        if not call["use_separate_proj_weight"]:
            weights = [rows(call["in_proj_weight"], slice(part * width, (part + 1) * width)) for part in range(3)]
        biases = [None] * 3 if call["in_proj_bias"] is None else call["in_proj_bias"].chunk(3)
        each = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (linear(x, weight, bias) for x, weight, bias in each)
    mask, padding = _mask(call["attn_mask"], q), _mask(call["key_padding_mask"], q)
    length, batch = query.shape[:2]
    added = 0
    if call["bias_k"] is not None:
        k = torch.cat([k, call["bias_k"].expand(1, batch, -1)])
        v = torch.cat([v, call["bias_v"].expand(1, batch, -1)])
        added += 1
    q, k, v = (x.view(x.shape[0], batch, heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    if call["static_k"] is not None:
        k = call["static_k"].view(batch, heads, *call["static_k"].shape[1:])
    if call["static_v"] is not None:
        v = call["static_v"].view(batch, heads, *call["static_v"].shape[1:])
    if call["add_zero_attn"]:
        zero = k.new_zeros(batch, heads, 1, k.shape[-1])
        k, v = torch.cat([k, zero], 2), torch.cat([v, zero], 2)
        added += 1
    if mask is not None:
        mask = F.pad(mask, (0, added))
        mask = mask.view(batch, heads, length, -1) if mask.dim() == 3 else mask
    if padding is not None:
        padding = F.pad(padding.view(batch, 1, 1, -1), (0, added))
        mask = padding if mask is None else mask + padding
    result = attend(rule, q, k, v, mask)
    output = linear(
        result.permute(2, 0, 1, 3).reshape(length, batch, -1), call["out_proj_weight"], call["out_proj_bias"]
    )
    shown = None
    if call["need_weights"]:
        with torch.no_grad():
            products = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            shown = (products if mask is None else products + mask).softmax(-1)
            shown = shown.mean(1) if call["average_attn_weights"] else shown
    if not batched:
        output, shown = output.squeeze(1), None if shown is None else shown.squeeze(0)
    return output, shown


def _mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
