"""Integer codes of quantized weights: recovered from the model, and packed into bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.plan import by_rows

__all__ = ["integer_codes", "pack_codes", "storage_width", "unpack_codes"]


def storage_width(bits: Tensor, allowed: Sequence[int] = (2, 4, 8)) -> Tensor:
    """Narrowest of the allowed integer types that holds each width.

    Raises:
        ArtifactError: None holds the widest.
    """
    widest = int(bits.max()) if bits.numel() else 0
    if widest > max(allowed):
        raise ArtifactError(
            f"a weight has {widest} bits, but onnx_bits={tuple(allowed)} allows at most {max(allowed)}: "
            "allow 8, or give MixedPrecision smaller bits"
        )
    storage = torch.full_like(bits, max(allowed), dtype=torch.int64)
    for width in sorted(allowed, reverse=True):
        storage[bits <= width] = width
    return storage


def integer_codes(name: str, weight: Tensor, scale: Tensor, bits: Tensor, codebook: Tensor | None = None) -> Tensor:
    """Recover the integer codes of a weight that lies on its grid.

    Args:
        name: Parameter name, for the error.
        weight: Weight, one channel per index of the first dimension.
        scale: Step of each row, shape [rows], >= 0; codes of a row of step 0 are 0.
        bits: Width of each row, shape [rows]; see `plan.by_rows`.
        codebook: The values that the layer shares, in place of the grid, see `CompressionPlan`.

    Returns:
        int8 tensor in the shape of the weight, on the CPU.

    Raises:
        ArtifactError: Shapes do not fit, or a weight is not a code within +-(2^(bits-1) - 1) times its scale.
    """
    weight, scale, bits = weight.detach().cpu(), scale.detach().cpu().float(), bits.detach().cpu().long()
    if codebook is not None:
        return _shared_codes(name, weight, codebook.detach().cpu())
    rows = _rows(name, weight, scale, bits)
    step = scale.double().reshape(-1, *[1] * (rows.dim() - 1))
    codes = torch.where(step > 0, (rows.double() / step.where(step > 0, 1.0)).round(), 0.0)
    limit = (2 ** (bits - 1) - 1).double().reshape(step.shape)
    off = ((codes * step).to(weight.dtype) != rows) | (codes.abs() > limit)
    if off.any():
        row = int(off.flatten(1).any(dim=1).nonzero()[0])
        channel, group = divmod(row, len(rows) // len(weight))
        where = f"channel {channel}" if len(rows) == len(weight) else f"channel {channel}, group {group}"
        raise ArtifactError(
            f"{name} does not lie on its grid: {int(off.sum())} of {off.numel()} weights are off, the first in "
            f"{where} (scale {scale[row].item():.6g}, {int(bits[row])} bits). "
            "Write the quantized values that the plan describes into the model, then save it"
        )
    return codes.to(torch.int8).reshape(weight.shape)


def _shared_codes(name: str, weight: Tensor, codebook: Tensor) -> Tensor:
    values = codebook.to(weight.dtype).contiguous()
    blocks = weight.reshape(len(values), -1).contiguous()
    last = values.shape[1] - 1
    places = torch.searchsorted(values, blocks).clamp(max=last)
    places = torch.where(blocks == 0, last // 2, places)
    off = values.gather(1, places) != blocks
    if off.any():
        raise ArtifactError(
            f"{name} does not lie on its codebook: {int(off.sum())} of {off.numel()} weights have none of its "
            f"{last + 1} values. Write the quantized values that the plan describes into the model, then save it"
        )
    return (places - last // 2).to(torch.int8).reshape(weight.shape)


def _rows(name: str, weight: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    try:
        if weight.dim() and bits.dim() == 1 and scale.shape == bits.shape:
            return by_rows(weight, len(bits))
        reason = ""
    except ValueError as error:
        reason = f" ({error})"
    channels = weight.shape[0] if weight.dim() else 0
    raise ArtifactError(
        f"{name} has {channels} output channels, but {tuple(scale.shape)} scales and {tuple(bits.shape)} bit "
        f"widths{reason}; save the model that the plan is of"
    )


def pack_codes(codes: Tensor, width: int) -> NDArray[np.uint8]:
    """Two's complement codes in bytes, several in one, the first in the lowest bits."""
    per_byte = 8 // width
    flat: NDArray[np.uint8] = codes.numpy().reshape(-1).view(np.uint8) & np.uint8(2**width - 1)
    flat = np.pad(flat, (0, -len(flat) % per_byte))
    packed = np.zeros(len(flat) // per_byte, np.uint8)
    for position in range(per_byte):
        packed |= flat[position::per_byte] << np.uint8(position * width)
    return packed


def unpack_codes(data: bytes, width: int, count: int) -> NDArray[np.int8]:
    """Undo `pack_codes`: the first `count` codes, int8 of shape [count]."""
    octets = np.frombuffer(data, np.uint8)
    fields = np.stack([octets >> np.uint8(shift) for shift in range(0, 8, width)], 1).reshape(-1)[:count]
    spare = np.uint8(8 - width)
    return (fields << spare).view(np.int8) >> spare.view(np.int8)
