"""The bytes around the codes of a packed file: a safetensors container, its digest, and the index."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lightning_xai_compress.errors import ArtifactError

__all__ = [
    "VERSIONS",
    "Bytes",
    "Container",
    "inflate",
    "open_container",
    "read_json",
    "write_container",
    "write_json",
]

Bytes = NDArray[np.uint8]

VERSIONS = (1, 2, 3)
"""Versions of the format that are read. Files are of version 1, unless they hold groups of input channels."""

_FORMAT = "lightning-xai-compress"
_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "stream": ("U32", np.dtype("<u4")),
    "rest": ("U8", np.dtype("u1")),
    "index": ("U8", np.dtype("u1")),
}
_NO_DIGEST = b"0" * 64
_MAX_HEADER = 1 << 16
_JSON, _JSON_EACH, _MAX_JSON = 1 << 20, 1 << 6, 1 << 24  # what any index may unfold to; for each of its bytes; at most
_PIECE = 1 << 20  # bytes that are hashed at a time
_WHOLE = "copy it again, or export it again"
_PLAIN = "a plain safetensors file is read by safetensors.torch.load_file"


@dataclass(frozen=True)
class Container:
    """An open packed file whose digest is right: its parts are read when they are asked for.

    Args:
        file: The file.
        source: What to call it in errors.
        size: Bytes of the file.
        places: First byte of each part, and its length in bytes.
        version: Of the format.
    """

    file: BinaryIO
    source: str
    size: int
    places: Mapping[str, tuple[int, int]]
    version: int

    def read(self, part: str, start: int = 0, length: int | None = None) -> bytes:
        """Read some bytes of a part, or all of it.

        Raises:
            ValueError: It ends before.
        """
        first, size = self.places[part]
        length = size if length is None else length
        if not 0 <= start <= start + length <= size:
            raise ValueError(f"{part} has {size} bytes, expected {start + length}")
        self.file.seek(first + start)
        data = self.file.read(length)
        if len(data) != length:
            raise ValueError(f"{part} ends while it is read")
        return data


def write_container(parts: Mapping[str, NDArray[Any]], *, version: int = 1) -> bytes:
    """Put the three parts into a safetensors file whose metadata holds format, version and a digest.

    Written by hand because `safetensors.save` orders metadata at random. The digest is the SHA-256 of the whole file
    with 64 zeros in its place.
    """
    header: dict[str, Any] = {
        "__metadata__": {"format": _FORMAT, "version": str(version), "sha256": _NO_DIGEST.decode()}
    }
    offset = 0
    for name, (label, _) in _DTYPES.items():
        end = offset + parts[name].nbytes
        header[name] = {"dtype": label, "shape": [len(parts[name])], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(parts[name].astype(dtype).tobytes() for name, (_, dtype) in _DTYPES.items())
    length = len(text).to_bytes(8, "little")
    digest = hashlib.sha256(length + text + body).hexdigest()
    return length + text.replace(_NO_DIGEST, digest.encode()) + body


@contextmanager
def open_container(path: str | Path) -> Iterator[Container]:
    """Open a packed file and check all that can be checked without decoding it, its digest last.

    Raises:
        FileNotFoundError: No such file.
        ArtifactError: The file is cut short, damaged, of another version, or none of ours.
    """
    source = str(path)
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        length, text = _read_header(file, before.st_size, source)
        header = _parse_header(text, source)
        metadata = header.get("__metadata__")
        metadata = metadata if isinstance(metadata, dict) else {}
        if metadata.get("format") != _FORMAT:
            raise ArtifactError(
                f"{source} is not a packed file: expected format {_FORMAT!r} in its metadata, "
                f"got {_short(metadata.get('format', 'none'))}; {_PLAIN}"
            )
        version = next((each for each in VERSIONS if metadata.get("version") == str(each)), None)
        if version is None:
            raise ArtifactError(
                f"{source} was written by version {_short(metadata.get('version'))} of the format, this package reads "
                f"{', '.join(map(str, VERSIONS))}: install the release of lightning-xai-compress that wrote it, or "
                "export the model again"
            )
        places = _places(header, 8 + len(text), before.st_size, source)
        _check_digest(file, length + text, str(metadata.get("sha256")), source)
        yield Container(file, source, before.st_size, places, version)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ArtifactError(f"{source} was changed while it was read: read it again when it is complete")


def _read_header(file: BinaryIO, size: int, source: str) -> tuple[bytes, bytes]:
    length = file.read(8)
    count = int.from_bytes(length, "little")
    if len(length) < 8 or count > size - 8:
        raise ArtifactError(
            f"{source} is cut short or no safetensors file: expected a header of {count} bytes, "
            f"got {max(0, size - 8)}; {_WHOLE}"
        )
    if count > _MAX_HEADER or count % 8:
        raise ArtifactError(
            f"{source} is damaged or no packed file: expected a header of at most {_MAX_HEADER} bytes, "
            f"a multiple of 8, got {count}; {_WHOLE}, or if it is not ours: {_PLAIN}"
        )
    return length, file.read(count)


def _parse_header(text: bytes, source: str) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError(f"a {type(header).__name__}")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{source} is damaged or no safetensors file: expected a header of one JSON object, got {_short(error)}; "
            f"{_WHOLE}"
        ) from error
    return header


def _places(header: Mapping[str, Any], start: int, size: int, source: str) -> dict[str, tuple[int, int]]:
    """Where the parts are: they follow each other without gaps and end where the file ends."""
    names = sorted(header.keys() - {"__metadata__"})
    if names != sorted(_DTYPES):
        raise ArtifactError(
            f"{source} is damaged: expected the tensors {sorted(_DTYPES)}, got {_short(names)}; {_WHOLE}"
        )
    places = {}
    offset = 0
    for name, (label, dtype) in _DTYPES.items():
        try:
            end = header[name]["data_offsets"][1]
            expected = {"dtype": label, "shape": [(end - offset) // dtype.itemsize], "data_offsets": [offset, end]}
            good = type(end) is int and end >= offset and (end - offset) % dtype.itemsize == 0
            good = good and json.dumps(expected, sort_keys=True) == json.dumps(header[name], sort_keys=True)
        except (LookupError, TypeError, ArithmeticError, ValueError, RecursionError):
            good = False
        if not good:
            raise ArtifactError(
                f"{source} is damaged: expected {name} of dtype {label} and one dimension from byte {offset} on, "
                f"got {_short(header[name])}; {_WHOLE}"
            )
        places[name] = (start + offset, end - offset)
        offset = end
    if start + offset != size:
        raise ArtifactError(f"{source} is damaged or cut short: expected {start + offset} bytes, got {size}; {_WHOLE}")
    return places


def _check_digest(file: BinaryIO, head: bytes, digest: str, source: str) -> None:
    """Hash the rest of the file behind a head in which zeros stand for the digest."""
    known = digest.encode(errors="replace")
    good = len(known) == len(_NO_DIGEST) and head.count(known) == 1
    checksum = hashlib.sha256(head.replace(known, _NO_DIGEST) if good else b"")
    while piece := file.read(_PIECE):
        checksum.update(piece)
    if not good or checksum.hexdigest() != digest:
        raise ArtifactError(
            f"{source} is damaged or cut short: expected SHA-256 {_short(digest[:12])}..., "
            f"its bytes give {checksum.hexdigest()[:12]}...; {_WHOLE}"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("an object that has a key twice")
    return content


def _short(content: object) -> str:
    """What a file says, fit for an error message."""
    try:
        text = repr(str(content))[1:-1] if isinstance(content, str | Exception) else repr(content)
    except RecursionError:
        return "something nested"
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:200] + "..."


def write_json(content: object) -> Bytes:
    """Compress a JSON object.

    Raises:
        ArtifactError: It unfolds to more than readers take.
    """
    text = json.dumps(content, separators=(",", ":")).encode()
    data = zlib.compress(text, 9)
    if len(text) > _json_limit(data):
        raise ArtifactError(
            f"expected an index of at most {_json_limit(data)} bytes, got {len(text)}: this model has too many "
            "tensors, too long names or too much provenance for one packed file; split it"
        )
    return np.frombuffer(data, np.uint8)


def read_json(data: bytes) -> dict[str, Any]:
    """Give a JSON object back.

    Raises:
        ValueError: Not a JSON object, one with a key twice, or more of it than `data` has a reason to hold.
        zlib.error: Damaged.
    """
    content = json.loads(inflate(data, _json_limit(data), exact=False), object_pairs_hook=_unique)
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {type(content).__name__}")
    return content


def _json_limit(data: bytes) -> int:
    return min(_MAX_JSON, max(_JSON, _JSON_EACH * len(data)))


def inflate(data: bytes, size: int, *, exact: bool = True) -> bytes:
    """Unfold a zlib stream to at most, or exactly, so many bytes.

    Raises:
        ValueError: It is longer or shorter.
        zlib.error: Damaged.
    """
    stream = zlib.decompressobj()
    content = stream.decompress(data, size + 1)  # one more: 0 would mean without limit
    if not stream.eof or stream.unused_data or len(content) > size or (exact and len(content) != size):
        raise ValueError(f"expected {'' if exact else 'at most '}{size} bytes in a zlib stream, got others")
    return content
