"""The bytes around the codes of a packed file: safetensors container, digest, index, and byte planes of what is raw."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from lightning_xai_compress.errors import ArtifactError

__all__ = [
    "VERSION",
    "Bytes",
    "join_planes",
    "read_container",
    "read_json",
    "split_planes",
    "write_container",
    "write_json",
]

Bytes = NDArray[np.uint8]

VERSION = 1
_FORMAT = "lightning-xai-compress"
_PARTS = {"stream": np.dtype(np.uint32), "rest": np.dtype(np.uint8), "index": np.dtype(np.uint8)}
_SAFETENSORS_DTYPES = {"stream": "U32", "rest": "U8", "index": "U8"}
_NO_DIGEST = "0" * 64
_MAX_HEADER = 1 << 16
_MAX_JSON = 1 << 26
_WHOLE = "copy it again, or export it again"


def write_container(parts: Mapping[str, NDArray[Any]]) -> bytes:
    """Put the three parts into a safetensors file whose metadata holds format, version and a digest.

    Written by hand because `safetensors.save` orders metadata at random. The digest is the SHA-256 of the whole file
    with 64 zeros in its place.
    """
    header: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "version": str(VERSION), "sha256": _NO_DIGEST}}
    offset = 0
    for name, dtype in _SAFETENSORS_DTYPES.items():
        end = offset + parts[name].nbytes
        header[name] = {"dtype": dtype, "shape": [len(parts[name])], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    little_endian = (part.astype(part.dtype.newbyteorder("<")).tobytes() for part in (parts[name] for name in _PARTS))
    body = b"".join(little_endian)
    length = len(text).to_bytes(8, "little")
    digest = hashlib.sha256(length + text + body).hexdigest()
    return length + text.replace(_NO_DIGEST.encode(), digest.encode()) + body


def read_container(data: bytes, source: str) -> dict[str, NDArray[Any]]:
    """Check a packed file and give its parts back.

    Args:
        data: The whole file.
        source: What to call it in errors.

    Raises:
        ArtifactError: The file is cut short, damaged, of another version, or none of ours.
    """
    metadata = _metadata(data, source)
    if metadata.get("format") != _FORMAT:
        raise ArtifactError(
            f"{source} is not a packed file: expected format {_FORMAT!r} in its metadata, "
            f"got {metadata.get('format')!r}; a plain safetensors file is read by safetensors.torch.load_file"
        )
    if metadata.get("version") != str(VERSION):
        raise ArtifactError(
            f"{source} was written by version {metadata.get('version')} of the format, this package reads {VERSION}: "
            "install the release of lightning-xai-compress that wrote it, or export the model again"
        )
    digest = str(metadata.get("sha256")).encode(errors="replace")
    head, zeros = data[: 8 + _MAX_HEADER], _NO_DIGEST.encode()
    checksum = hashlib.sha256(head.replace(digest, zeros, 1) if len(digest) == len(zeros) else b"")
    checksum.update(memoryview(data)[len(head) :])
    if checksum.hexdigest().encode() != digest:
        raise ArtifactError(
            f"{source} is damaged or cut short: expected SHA-256 {digest[:12].decode(errors='replace')}..., "
            f"its {len(data)} bytes give {checksum.hexdigest()[:12]}...; {_WHOLE}"
        )
    try:
        parts = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{source} is damaged: expected a safetensors file, got {error}; {_WHOLE}") from error
    if {name: part.dtype for name, part in parts.items()} != _PARTS or any(part.ndim != 1 for part in parts.values()):
        raise ArtifactError(
            f"{source} is damaged: expected the tensors {sorted(_PARTS)}, got {sorted(parts)}; {_WHOLE}"
        )
    return parts


def _metadata(data: bytes, source: str) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ArtifactError(
            f"{source} is cut short or no safetensors file: expected a header of {length} bytes, "
            f"got {max(0, len(data) - 8)}; {_WHOLE}"
        )
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header.get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{source} is damaged or no safetensors file: expected a JSON header, got {error}; {_WHOLE}"
        ) from error
    return metadata if isinstance(metadata, dict) else {}


def write_json(content: object) -> Bytes:
    """Compress a JSON object."""
    return np.frombuffer(zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9), np.uint8)


def read_json(data: Bytes) -> Any:
    """Give a JSON object back.

    Raises:
        ValueError: Not JSON, or more than 64 MiB of it.
        zlib.error: Damaged.
    """
    return json.loads(_inflate(data.tobytes(), _MAX_JSON, exact=False))


def _inflate(data: bytes, size: int, *, exact: bool = True) -> bytes:
    stream = zlib.decompressobj()
    content = stream.decompress(data, size)
    if not stream.eof or stream.unused_data or (exact and len(content) != size):
        raise ValueError(f"compressed bytes unfold to another length than {size}")
    return content


def split_planes(chunks: Sequence[tuple[int, Bytes]]) -> tuple[Bytes, list[int], list[int]]:
    """Store numbers by byte planes: all first bytes, then all second ones, each deflated where that is shorter.

    Args:
        chunks: Bytes of a number, and the numbers, uint8 of shape [numbers * bytes].

    Returns:
        All planes in a row; the length of each plane that is deflated, 0 for one stored as it is; the length that each
        chunk takes.
    """
    planes: list[bytes] = []
    lengths: list[int] = []
    sizes: list[int] = []
    for itemsize, numbers in chunks:
        first = len(planes)
        for plane in numbers.reshape(-1, itemsize).T:
            plain = plane.tobytes()
            small = zlib.compress(plain, 9)
            pays = len(small) < len(plain)
            planes.append(small if pays else plain)
            lengths.append(len(small) if pays else 0)
        sizes.append(sum(map(len, planes[first:])))
    return np.frombuffer(b"".join(planes), np.uint8), lengths, sizes


def join_planes(data: Bytes, lengths: Sequence[int], chunks: Sequence[tuple[int, int]]) -> Iterator[Bytes]:
    """Give the chunks of `split_planes` back one by one.

    Args:
        data: All planes in a row.
        lengths: As `split_planes` gave them.
        chunks: Bytes of a number, and how many numbers, of each chunk.

    Raises:
        ValueError: Lengths, chunks and data do not agree.
        zlib.error: Damaged.
    """
    if len(lengths) != sum(itemsize for itemsize, _ in chunks) or min(lengths, default=0) < 0:
        raise ValueError(f"expected {sum(itemsize for itemsize, _ in chunks)} byte planes, got {len(lengths)}")
    offset = 0
    left = iter(lengths)
    for itemsize, count in chunks:
        numbers = np.empty((count, itemsize), np.uint8)
        for column in range(itemsize):
            length = next(left)
            piece = data[offset : offset + (length or count)]
            offset += length or count
            plain = np.frombuffer(_inflate(piece.tobytes(), count), np.uint8) if length else piece
            if len(plain) != count:
                raise ValueError("byte planes end early")
            numbers[:, column] = plain
        yield numbers.reshape(-1)
    if offset != len(data):
        raise ValueError(f"byte planes take {offset} bytes of {len(data)}")
