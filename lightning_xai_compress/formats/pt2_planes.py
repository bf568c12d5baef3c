"""Quantized weights as bit planes: every width takes exactly its bits, and a traced graph can put them together again.

A width is a sum of powers of two (3 = 2 + 1, 7 = 4 + 2 + 1), and a plane holds one of these parts of all numbers of one
width, so that no number straddles two bytes. Rows (output channels, or groups in them) of one width lie together;
`order` says where each row of the weight is among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_xai_compress.formats.codes import integer_codes
from lightning_xai_compress.plan import MAX_BITS, MIN_BITS, look_up

__all__ = ["PackedWeight", "memory_order", "parts_of", "plane_name", "read_weight"]


def parts_of(width: int) -> Iterator[tuple[int, int]]:
    """Powers of two that a width is the sum of, largest first, each with the position of its lowest bit."""
    left = width
    for part in (8, 4, 2, 1):
        if left & part:
            left -= part
            yield part, left


def plane_name(width: int, part: int) -> str:
    """Name of the buffer that holds `part` bits of each number of `width` bits."""
    return f"int{width}_plane{part}"


def memory_order(weight: Tensor) -> tuple[int, ...]:
    """Dimensions of a weight from the outermost in memory to the innermost: (0, 2, 3, 1) for channels_last."""
    strides = weight.stride()
    return tuple(sorted(range(weight.dim()), key=lambda index: -strides[index]))


class PackedWeight(nn.Module):
    """One quantized weight in buffers: `scales` [rows], a plane for each part of each width, and `order` if needed.

    Args:
        name: Parameter name, for errors.
        weight: Lies on its grid.
        scale: Step of each row, exact in bfloat16.
        bits: Width of each row.
        codebook: The values that the weights share, in place of a grid; they are in the buffer `codebook`.

    Raises:
        ArtifactError: The weight does not lie on its grid.
    """

    def __init__(self, name: str, weight: Tensor, scale: Tensor, bits: Tensor, codebook: Tensor | None = None) -> None:
        super().__init__()
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        self.order_in_memory = memory_order(weight)
        single = any(length == 1 for length in weight.shape)
        dense = torch.empty_like(weight).stride() == weight.stride()  # no gaps between numbers, and none twice
        self.strides = weight.stride() if single and dense else None
        rows = len(bits)
        codes = integer_codes(name, weight, scale, bits, codebook).reshape(rows, -1)
        self.columns = codes.shape[1] if rows else 0
        widths = bits.detach().cpu().long()
        grouped = torch.argsort(widths, stable=True)
        self.groups = [
            (int(width), int(count)) for width, count in zip(*widths.unique(return_counts=True), strict=True)
        ]
        self.register_buffer("scales", scale.detach().cpu().to(torch.bfloat16))
        if codebook is not None:
            self.register_buffer("codebook", codebook.detach().cpu().to(torch.bfloat16))
        if not torch.equal(grouped, torch.arange(rows)):
            narrow = torch.int16 if rows <= 2**15 else torch.int32
            self.register_buffer("order", torch.argsort(grouped).to(narrow))
        for width, _ in self.groups:
            numbers = codes[widths == width].numpy().reshape(-1).astype(np.int16) + (2 ** (width - 1) - 1)
            for part, lowest in parts_of(width):
                self.register_buffer(plane_name(width, part), torch.from_numpy(_pack(numbers >> lowest, part)))

    @property
    def version(self) -> int:
        """Of the index that a reader needs to know."""
        if "codebook" in self._buffers:
            return 3
        return 2 if len(self.get_buffer("scales")) > self.shape[0] else 1

    def forward(self) -> Tensor:
        """The weight, in the shape, dtype and memory order that it had."""
        groups = [self._codes(width, count * self.columns).reshape(count, self.columns) for width, count in self.groups]
        rows = groups[0] if len(groups) == 1 else torch.cat(groups)
        if "order" in self._buffers:
            rows = rows.index_select(0, self.get_buffer("order").to(torch.int32))
        if "codebook" in self._buffers:
            rows = look_up(rows, self.get_buffer("codebook"))
        # at most 8 bits times 8 bits of a bfloat16: exact; a codebook's scales are 1
        values = rows.to(torch.float32) * self.get_buffer("scales").to(torch.float32).unsqueeze(1)
        weight = values.to(self.dtype).reshape(self.shape)
        if self.order_in_memory == tuple(range(len(self.shape))):
            return weight
        # kernels, and with them the last bits of the outputs, depend on strides
        back = [self.order_in_memory.index(index) for index in range(len(self.shape))]
        laid_out: Tensor = weight.permute(self.order_in_memory).clone(memory_format=torch.contiguous_format)
        laid_out = laid_out.permute(back)
        # a dimension of length 1 may have any stride, and kernels look at that, too
        return laid_out if self.strides is None else laid_out.as_strided(self.shape, self.strides)

    def _codes(self, width: int, count: int) -> Tensor:
        numbers: Tensor | None = None
        for part, lowest in parts_of(width):
            bits = _unpack(self.get_buffer(plane_name(width, part)), part, count)
            bits = bits << lowest if lowest else bits
            numbers = bits if numbers is None else numbers | bits
        assert numbers is not None
        codes: Tensor = (numbers - (2 ** (width - 1) - 1)).view(torch.int8)  # bytes wrap: 255 is -1
        return codes


def read_weight(
    buffers: Mapping[str, NDArray[np.uint8]],
    groups: Sequence[tuple[int, int]],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Put a weight together from the bytes of its buffers, without a graph.

    Args:
        buffers: By the ends of their names.
        groups: Widths, and rows of each.
        shape: Of the weight; it has as many rows as output channels, or a multiple that divides its input channels.
        dtype: Of the weight.

    Raises:
        ValueError, LookupError: They do not fit.
    """
    rows = sum(count for _, count in groups)
    each, left = divmod(rows, max(1, shape[0]))
    if left or each < 1 or (each > 1 and (len(shape) < 2 or shape[1] % each)):
        raise ValueError(f"a weight of shape {list(shape)}, but rows of {[count for _, count in groups]}")
    columns = int(np.prod(shape[1:], dtype=np.int64)) // each
    planes = [
        (plane_name(width, part), -(-count * columns * part // 8))
        for width, count in groups
        for part, _ in parts_of(width)
    ]
    outside = min(groups)[0] < MIN_BITS or max(groups)[0] > MAX_BITS or columns < 0
    if outside or any(len(buffers[name]) != size for name, size in planes):
        raise ValueError(f"planes that do not hold {rows} rows of {columns} numbers")
    parts = []
    for width, count in groups:
        numbers = np.zeros(count * columns, np.int16)
        for part, lowest in parts_of(width):
            digits = np.unpackbits(buffers[plane_name(width, part)], bitorder="little", count=len(numbers) * part)
            numbers |= digits.reshape(-1, part) @ (1 << np.arange(lowest, lowest + part, dtype=np.int16))
        parts.append((numbers - (2 ** (width - 1) - 1)).reshape(count, columns))
    codes = np.concatenate(parts)
    if "order" in buffers:
        narrow = np.dtype("<i2") if rows <= 2**15 else np.dtype("<i4")
        order = buffers["order"].view(narrow)
        if not np.array_equal(np.sort(order), np.arange(rows)):
            raise ValueError("an order that is no permutation")
        codes = codes[order]
    scales = torch.from_numpy(buffers["scales"].view(np.int16)).view(torch.bfloat16).float()
    if len(scales) != rows:
        raise ValueError(f"{rows} rows, but {len(scales)} scales")
    values = torch.from_numpy(codes).float()
    if "codebook" in buffers:
        codebook = torch.from_numpy(buffers["codebook"].view(np.int16)).view(torch.bfloat16).float()
        count = 2 ** groups[0][0] - 1
        if len(groups) > 1 or not len(codebook) or len(codebook) % count or rows % (len(codebook) // count):
            raise ValueError(f"codebooks of {len(codebook)} values in all for {rows} rows of widths {dict(groups)}")
        if codes.size and int(np.abs(codes).max()) > count // 2:
            raise ValueError(f"codes beyond a codebook of {count} values")
        values = look_up(values, codebook.view(-1, count))
    return (values * scales[:, None]).to(dtype).reshape(tuple(shape))


def _pack(numbers: NDArray[np.int16], part: int) -> NDArray[np.uint8]:
    """The lowest `part` bits of each number, several in a byte, the first in the lowest bits."""
    digits = (numbers[:, None] >> np.arange(part, dtype=np.int16)) & 1
    return np.packbits(digits.astype(np.uint8), bitorder="little")


def _unpack(plane: Tensor, part: int, count: int) -> Tensor:
    if part == 8:
        return plane
    shifts = torch.arange(0, 8, part, dtype=torch.uint8, device=plane.device)
    fields: Tensor = (plane.unsqueeze(1) >> shifts & 2**part - 1).reshape(-1)
    return fields if len(fields) == count else fields[:count]
