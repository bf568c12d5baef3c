"""What every weight goes through around every optimizer step, in place and in few passes over memory.

Equal to `quantize` and `refit_scales`, which call torchao, bit for bit; but in blocks of rows that stay in the
processor's cache from the first operation to the last, without temporaries of the size of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai_compress.plan import by_rows
from lightning_xai_compress.quantization.grid import in_memory_order, largest_code, least_squares

__all__ = ["mask_", "requantize_"]

_BLOCK = 2**19  # weights of a block, two megabytes as float32: smaller ones cost more in calls than they save in memory
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask_(tensor: Tensor, keep: Tensor) -> None:
    """Set to zero what is not kept, even where it is infinite or NaN.

    So does `masked_fill_`, which on a processor decides weight by weight, and takes ten times as long.

    Args:
        tensor: Floating point, of one dimension or more.
        keep: Boolean, of the same shape.
    """
    size = _rows_of_a_block(tensor)
    for part, kept in zip(tensor.split(size), keep.split(size), strict=True):
        _masked(part, kept, out=part)


def requantize_(
    weight: Tensor, latent: Tensor, bits: Tensor, scale: Tensor, *, keep: Tensor | None = None, refit: bool = True
) -> Tensor:
    """Keep what an optimizer made of a weight as its latent, masked, and put the weight onto its grid.

    Args:
        weight: Shape [channels, ...], as the optimizer left it; becomes code * scale.
        latent: Of the same shape and dtype; becomes the weight, zero where it is not kept.
        bits: Width of each row, shape [rows], 2..8; see `plan.by_rows`.
        scale: Step of each row so far, float32 of shape [rows].
        keep: Boolean, of the weight's shape and order of memory; None: all.
        refit: Whether scales are fitted to the latent first.

    Returns:
        The scales of the grid, as `refit_scales` gives them; those that came without `refit`.

    Raises:
        ValueError: The weight cannot be cut into so many rows.
    """
    if len(bits) != len(weight):
        return _requantize_groups(weight, latent, bits, scale, keep=keep, refit=refit)
    values, latents = _rows(weight, weight), _rows(latent, weight)
    kept = None if keep is None else _rows(keep, weight)
    limit = largest_code(bits).unsqueeze(1)
    fitted = scale.clone()
    size = _rows_of_a_block(values)
    buffer = torch.empty_like(values[:size], dtype=torch.float32) if refit else values[:0]
    for first in range(0, len(values), size):
        block = slice(first, first + size)
        if kept is None:
            latents[block].copy_(values[block])
        else:
            _masked(values[block], kept[block], out=latents[block])
        exact = latents[block].float()  # itself where it is float32
        codes = values[block] if values.dtype == torch.float32 else torch.empty_like(exact)
        if refit:
            _codes(exact, scale[block], limit[block], out=codes)
            products = torch.mul(exact, codes, out=buffer[: len(codes)]).sum(1)
            squares = torch.square(codes, out=buffer[: len(codes)]).sum(1)
            fitted[block] = least_squares(products, squares, scale[block])
        _codes(exact, fitted[block], limit[block], out=codes)
        codes.add_(0.0).mul_(fitted[block].unsqueeze(1))  # -0 becomes 0, as integers have it
        if codes.dtype != values.dtype:
            values[block].copy_(codes)
    for rows, tensor in ((values, weight), (latents, latent)):
        if rows.data_ptr() != tensor.data_ptr():  # a row's weights do not lie side by side
            ordered = in_memory_order(tensor, weight.stride())
            ordered.copy_(rows.view(ordered.shape))
    return fitted


def _requantize_groups(
    weight: Tensor, latent: Tensor, bits: Tensor, scale: Tensor, *, keep: Tensor | None, refit: bool
) -> Tensor:
    """The same for groups of input channels: copies where memory (channels_last) does not have them side by side."""
    parts = [by_rows(tensor, len(bits)) for tensor in (weight, latent)]
    kept = None if keep is None else by_rows(keep, len(bits))
    fitted = requantize_(parts[0], parts[1], bits, scale, keep=kept, refit=refit)
    for part, tensor in zip(parts, (weight, latent), strict=True):
        if part.data_ptr() != tensor.data_ptr():
            tensor.copy_(part.view(tensor.shape))
    return fitted


def _rows(tensor: Tensor, like: Tensor) -> Tensor:
    """All rows, in the order of the other tensor's memory; a copy where that has no rows."""
    return in_memory_order(tensor, like.stride()).reshape(len(tensor), -1)


def _masked(tensor: Tensor, keep: Tensor, *, out: Tensor) -> None:
    integers = _INTEGERS[tensor.element_size()]
    torch.bitwise_and(tensor.view(integers), keep.view(torch.int8).neg(), out=out.view(integers))  # -1: all bits set


def _codes(rows: Tensor, scale: Tensor, limit: Tensor, *, out: Tensor) -> Tensor:
    """Codes as floats; a row of scale 0 is all zero.

    Two bounds one after the other take a tenth of the time of `clamp` with tensors.
    """
    inverse = scale.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0).unsqueeze(1)
    torch.mul(rows, inverse, out=out).round_()
    torch.maximum(out, -limit, out=out)
    return torch.minimum(out, limit, out=out)


def _rows_of_a_block(tensor: Tensor) -> int:
    """Elsewhere than on a processor, many small operations would cost more than memory does."""
    if tensor.device.type != "cpu":
        return max(1, len(tensor))
    return max(1, _BLOCK * len(tensor) // max(1, tensor.numel()))
