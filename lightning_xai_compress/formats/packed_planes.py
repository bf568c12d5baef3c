"""Byte planes: how numbers that are not coded stand in a packed file."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from lightning_xai_compress.formats.container import Bytes, inflate

__all__ = ["PlaneReader", "PlaneWriter"]


class PlaneWriter:
    """Stores numbers by byte planes: all first bytes, then all second ones, each deflated where that is shorter."""

    def __init__(self) -> None:
        self._planes: list[bytes] = []
        self.lengths: list[int] = []
        """Of each plane that is deflated; 0 for one stored as it is."""

    def write(self, numbers: Bytes) -> int:
        """Store a chunk of numbers, uint8 of shape [numbers, bytes of a number]; give the bytes that it takes."""
        first = len(self._planes)
        for plane in numbers.T:
            plain = plane.tobytes()
            small = zlib.compress(plain, 9)
            pays = len(small) < len(plain)
            self._planes.append(small if pays else plain)
            self.lengths.append(len(small) if pays else 0)
        return sum(map(len, self._planes[first:]))

    def finish(self) -> Bytes:
        """All planes in a row."""
        return np.frombuffer(b"".join(self._planes), np.uint8)


class PlaneReader:
    """Gives chunks back one by one, in the order in which they were written.

    Args:
        read: Gives the bytes from a position on, so many.
        size: Bytes of all planes.
        lengths: As the writer had them.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, lengths: object) -> None:
        if not isinstance(lengths, list) or any(type(length) is not int or length < 0 for length in lengths):
            raise ValueError("lengths of byte planes must be integers >= 0")
        self._read, self._size, self._left, self._offset = read, size, iter(lengths), 0

    def next(self, count: int, itemsize: int) -> tuple[Bytes, int]:
        """Read a chunk.

        Args:
            count: How many numbers.
            itemsize: Bytes of each.

        Returns:
            uint8 of shape [count, itemsize], and the bytes that it takes.

        Raises:
            ValueError: There is less.
            zlib.error: Damaged.
        """
        start = self._offset
        numbers = np.empty((count, itemsize), np.uint8)
        for column in range(itemsize):
            length = next(self._left, None)
            if length is None:
                raise ValueError("there are fewer byte planes than the tensors need")
            piece = self._read(self._offset, length or count)
            self._offset += len(piece)
            numbers[:, column] = np.frombuffer(inflate(piece, count) if length else piece, np.uint8)
        return numbers, self._offset - start

    def finish(self) -> None:
        """Raise ValueError if anything is left."""
        if next(self._left, None) is not None or self._offset != self._size:
            raise ValueError(f"byte planes take {self._offset} bytes of {self._size}")
