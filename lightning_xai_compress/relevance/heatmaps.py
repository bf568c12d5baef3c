"""Relevance of the input, from the pass that scores the weights, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from zennit.image import palette

from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.plan import HeatMaps
from lightning_xai_compress.relevance.interception import Interception

__all__ = ["heat_maps", "is_picture", "save_heatmaps"]


def is_picture(heatmaps: HeatMaps) -> bool:
    """Whether the inputs are images [n, channels, height, width] of one or three channels."""
    return heatmaps.relevance.dim() == 4 and heatmaps.relevance.shape[1] in (1, 3)


def save_heatmaps(heatmaps: HeatMaps, path: str | Path) -> None:
    """Draw images [n, channels, height, width]: inputs above, relevance (red for, blue against) below, by zennit.image.

    Args:
        heatmaps: Of a scoring pass.
        path: Of a picture file such as "relevance.png".

    Raises:
        RelevanceError: The inputs are not images of one or three channels.
    """
    if not is_picture(heatmaps):
        raise RelevanceError(
            f"inputs of shape {tuple(heatmaps.relevance.shape[1:])} are no images: expected [channels, height, width] "
            "with one or three channels"
        )
    shown = heatmaps.inputs.float()
    low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
    heat = heatmaps.relevance.float().sum(1)
    rows = [
        _colours((shown - low) / (high - low).clamp_min(1e-12), "gray"),
        _colours(heat.unsqueeze(1) / heat.abs().amax((1, 2)).clamp_min(1e-30).view(-1, 1, 1, 1) / 2 + 0.5, "bwr"),
    ]
    picture = Image.fromarray(np.concatenate(rows))
    factor = max(1, 96 // max(shown.shape[2:]))
    picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST).save(path)


def _colours(images: Tensor, cmap: str) -> np.ndarray[Any, Any]:
    """[n, channels, height, width] in [0, 1] -> uint8 [height, n * width, 3]; one channel by a colour map of zennit."""
    levels = (torch.cat(list(images), -1).permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
    if levels.shape[2] == 3:
        return levels
    # zennit 0.5.1's imgify hands its palette to Pillow as an array, which Pillow 13 does not take
    coloured: np.ndarray[Any, Any] = palette(cmap).reshape(256, 3)[levels[..., 0]]
    return coloured


def heat_maps(
    mode: Interception, tensor: Tensor, gradient: Tensor, reference: Sequence[Tensor], count: int
) -> HeatMaps:
    """Relevance x c of the first samples.

    Args:
        mode: Of the pass.
        tensor: The input, or the embedded tokens.
        gradient: Its c.
        reference: What the input is compared with (DeepLIFT); empty for none.
        count: At most so many samples.
    """
    value = tensor.detach() - reference[0] if reference else tensor.detach()
    relevance = value * gradient
    if mode.input_relevance is not None:
        relevance = relevance + mode.input_relevance
    if tensor is mode.tokens and mode.token_ids is not None:
        return HeatMaps(mode.token_ids[:count].detach().clone(), relevance.sum(-1)[:count])
    return HeatMaps(tensor.detach()[:count].clone(), relevance[:count])
