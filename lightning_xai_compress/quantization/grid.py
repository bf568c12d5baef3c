"""Values on a grid: symmetric integers per row, through torchao. The one file that imports torchao.

A weight becomes code * scale with codes in +-(2^(bits - 1) - 1): two bits are three values, zero is always exact, and
so a pruned weight stays pruned. Scales are rounded to bfloat16, which costs nothing (the codes are chosen for the
rounded scale) and halves their place on disk. A row is an output channel, or a group of input channels within one:
there are as many as there are bit widths (`plan.by_rows`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_xai_compress.plan import by_rows, look_up
from lightning_xai_compress.quantization.codebook import nearest_codes

_pytree = logging.getLogger("torch.utils._pytree")
_was_disabled, _pytree.disabled = _pytree.disabled, True  # torchao 0.18 triggers a deprecation note of torch's own
from torchao.quantization import dequantize_affine, quantize_affine  # noqa: E402

_pytree.disabled = _was_disabled

__all__ = ["fit_scales", "in_memory_order", "largest_code", "least_squares", "quantize", "refit_scales"]

_CANDIDATES = 80


def quantize(weight: Tensor, bits: Tensor, scale: Tensor, codebook: Tensor | None = None) -> Tensor:
    """Put a weight onto its grid.

    torchao takes one range a call; clipping each row to its own range first and rounding with the widest gives the
    same codes for rows of any widths in one call.

    Args:
        weight: Shape [channels, ...], floating point.
        bits: Width of each row, shape [rows], 2..8.
        scale: Step of each row, float32 of shape [rows], >= 0; 0 makes the row all zero.
        codebook: The values that a layer shares, in place of the grid, see `CompressionPlan`.

    Returns:
        The values code * scale, or those of the codebook, in the dtype of the weight.

    Raises:
        ValueError: The weight cannot be cut into so many rows.
    """
    if codebook is not None:
        return look_up(nearest_codes(weight, codebook), codebook).to(weight.dtype)
    rows = by_rows(weight.detach(), len(bits)).flatten(1).float()
    codes = _codes(rows, bits, scale)
    block = (1, rows.shape[1])
    values = dequantize_affine(codes, block, scale, torch.zeros_like(scale), torch.int8, -127, 127)
    grid: Tensor = values.to(weight.dtype).view_as(weight)
    return grid


def _codes(rows: Tensor, bits: Tensor, scale: Tensor) -> Tensor:
    limit = (scale * largest_code(bits)).unsqueeze(1)
    step = torch.where(scale > 0, scale, 1.0)
    block = (1, rows.shape[1])
    clipped = rows.clamp(-limit, limit)
    codes: Tensor = quantize_affine(clipped, block, step, torch.zeros_like(step), torch.int8, -127, 127)
    return codes


def refit_scales(weight: Tensor, bits: Tensor, scale: Tensor) -> Tensor:
    """Move each scale to its least squared error with the codes held: one step of alternating minimisation.

    Args:
        weight: Shape [channels, ...].
        bits: Width of each row, shape [rows].
        scale: Scales so far, shape [rows].

    Returns:
        New scales, float32 but exact in bfloat16; a row without codes keeps its scale.

    Raises:
        ValueError: The weight cannot be cut into so many rows.
    """
    weight = by_rows(weight.detach(), len(bits))
    rows = in_memory_order(weight, weight.stride()).flatten(1).float()
    codes = _codes(rows, bits, scale).float()
    return least_squares((rows * codes).sum(1), codes.square().sum(1), scale)


def least_squares(products: Tensor, squares: Tensor, scale: Tensor) -> Tensor:
    """Scales from each row's sums of weight * code and of code^2; `scale` where there are no codes."""
    fitted = products / squares.clamp(min=1.0)
    return _round(torch.where((squares > 0) & (fitted > 0), fitted, scale))


def in_memory_order(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """A view whose dimensions after the first lie as memory of these strides has them.

    The sum over a row depends on the order of its weights in its last digits. In this order it needs no copy, with
    channels_last neither.

    Args:
        tensor: Shape [rows, ...].
        stride: Of the tensor, or of another one of its shape whose order is wanted.
    """
    return tensor.permute(0, *sorted(range(1, tensor.dim()), key=lambda dimension: -stride[dimension]))


def fit_scales(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Find the scale of least squared error for every row at one width, by search.

    Args:
        weight: Shape [rows, ...], see `plan.by_rows`.
        bits: Width, 2..8.

    Returns:
        Scales [rows] and the squared error of every weight, in the shape of the weight.
    """
    rows = weight.detach().flatten(1).float()
    largest_code = 2.0 ** (bits - 1) - 1
    peak = rows.abs().amax(1)
    best = torch.zeros_like(peak)
    best_error = rows.square().sum(1)
    # the best grid clips more the coarser it is
    lowest = {2: 0.2, 3: 0.3, 4: 0.4}.get(bits, 0.5)
    for share in torch.linspace(lowest, 1.0, _CANDIDATES).tolist():
        scale = _round(peak * (share / largest_code))
        step = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
        values = (rows / step).round_().clamp_(-largest_code, largest_code).mul_(step)
        error = values.sub_(rows).square_().sum(1)
        better = (error < best_error) & (scale > 0)
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    width = torch.full(peak.shape, bits, dtype=torch.uint8, device=peak.device)
    best = refit_scales(weight, width, best)
    return best, (quantize(weight.detach().float(), width, best) - weight.detach().float()).square()


def largest_code(bits: Tensor) -> Tensor:
    """Codes of each width reach from minus this to this."""
    return 2.0 ** (bits.float() - 1) - 1


def _round(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).float()
