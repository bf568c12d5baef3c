"""What files hold of a finished model: BatchNorm merged and the rest rounded, as `Files` says."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_xai_compress.formats.layout import has_memory
from lightning_xai_compress.formats.merging import merge_batchnorm, merged_names
from lightning_xai_compress.formats.registry import Files
from lightning_xai_compress.formats.rounding import round_to_float16
from lightning_xai_compress.plan import Skipped

__all__ = ["finished", "round_module"]


def round_module(model: nn.Module, files: Files, names_to_leave: Collection[str]) -> list[Skipped]:
    """Round for good what files round, so that the module is what was measured and what files hold.

    BatchNorm that files merge is left: it is rounded once it is merged, and the module keeps its own values.

    Args:
        model: Changed in place, where `files` says float16.
        files: How files are written.
        names_to_leave: Keys of the state dict that stay as they are: the quantized weights.

    Returns:
        What is not rounded, and why.
    """
    if not files.float16:
        return []
    merged = merged_names(model, names_to_leave) if files.merge_batchnorm else set()
    return round_to_float16(model, merged.union(names_to_leave))


@contextmanager
def finished(model: nn.Module, files: Files, names_to_leave: Collection[str]) -> Iterator[list[Skipped]]:
    """Inside, the model holds what files are to hold; afterwards its own values, bit for bit, also after an error.

    BatchNorm is merged first and rounded then, so that nothing is rounded twice.

    Args:
        model: Of which files are written or weighed.
        files: How they are written.
        names_to_leave: Keys of the state dict that stay as they are: the quantized weights.

    Yields:
        What is not merged or not rounded, and why.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    changeable = files.float16 or files.merge_batchnorm
    own = {
        name: tensor.detach().clone()
        for name, tensor in tensors.items()
        if changeable and name not in names_to_leave and has_memory(tensor)
    }
    try:
        skipped = merge_batchnorm(model, names_to_leave) if files.merge_batchnorm else []
        yield skipped + (round_to_float16(model, names_to_leave) if files.float16 else [])
    finally:
        with torch.no_grad():
            for name, value in own.items():
                tensors[name].detach().copy_(value)
