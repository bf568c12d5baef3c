"""The archive of the format "pt2": a zip that torch.export.load reads, always the same for the same program.

What `torch.export.save` writes is packed anew: without the random serialization id, each member deflated where that
pays, and with a SHA-256 over the whole file as the comment of the zip. Reading checks it, and never unpickles: what is
no plain tensor is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_xai_compress.errors import ArtifactError

__all__ = ["INDEX", "Archive", "Member", "read_archive", "write_archive"]

INDEX = "lightning_xai_compress.json"
"""Name of the extra file that says which buffers make which weight."""

_ROOT = "archive/"
_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"
_PLAIN = {
    *("models/model.json", "data/sample_inputs/model.pt", f"extra/{INDEX}"),
    *("archive_format", "archive_version", ".data/version", "byteorder"),
}
_RANDOM = ".data/serialization_id"
_VERSIONS = (1, 2, 3)  # of the index; 2: a weight has several rows an output channel, 3: one has a codebook
_RATIO = 1100  # deflate makes nothing smaller than this


@dataclass(frozen=True)
class Member:
    """A tensor in the archive: its bytes, and the name and size of the member that they are in."""

    content: bytes
    member: str
    bytes: int

    @property
    def array(self) -> NDArray[np.uint8]:
        """The bytes."""
        return np.frombuffer(self.content, np.uint8).copy()


@dataclass(frozen=True)
class Archive:
    """What an archive holds: the index, and the tensors of the program by name."""

    index: Mapping[str, Any]
    tensors: Mapping[str, Member]


def write_archive(path: Path, program: torch.export.ExportedProgram, index: Mapping[str, Any]) -> None:
    """Write a program and its index."""
    saved, packed = io.BytesIO(), io.BytesIO()
    text = json.dumps(index, separators=(",", ":"), sort_keys=True)
    torch.export.save(program, saved, extra_files={INDEX: text})
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(packed, "w") as target:
        for entry in source.infolist():
            if entry.filename == _ROOT + _RANDOM:
                continue
            content = source.read(entry)
            member = zipfile.ZipInfo(entry.filename)  # of 1980
            member.create_system = 3  # whatever system writes it
            member.compress_type = zipfile.ZIP_DEFLATED if _pays(content) else zipfile.ZIP_STORED
            target.writestr(member, content, compresslevel=6)
        target.comment = b"0" * 64
    data = packed.getvalue()[:-64]
    path.write_bytes(data + hashlib.sha256(data).hexdigest().encode())


def read_archive(path: Path) -> Archive:
    """Read a file of this format; nothing in it is run or unpickled.

    Raises:
        FileNotFoundError: No such file.
        ArtifactError: It is damaged, cut short, or none of ours.
    """
    data = path.read_bytes()
    if not data.startswith(b"PK\x03\x04"):
        raise ArtifactError(f"{path} is no pt2 archive: expected a zip file; give the file that the export wrote")
    if hashlib.sha256(data[:-64]).hexdigest().encode() != data[-64:]:
        raise ArtifactError(
            f"{path} is damaged, or was not written by this package: its SHA-256 is not the one at its end; "
            "copy it again, or export it again"
        )
    try:
        return _read(data)
    except ArtifactError as error:
        raise ArtifactError(f"{path} {error}") from error
    except Exception as error:  # a forged file may break at any point
        what = f"{type(error).__name__}: {error}"[:200]
        raise ArtifactError(f"{path} is damaged: expected a pt2 archive that holds together, got {what}") from error


def _read(data: bytes) -> Archive:
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        entries = {entry.filename: entry for entry in source.infolist()}
        if len(entries) < len(source.infolist()) or sum(each.file_size for each in entries.values()) > _RATIO * len(
            data
        ):
            raise ArtifactError("is forged: members of one name, or far larger than the file")

        def read(name: str) -> bytes:
            return source.read(entries[_ROOT + name])

        tensors: dict[str, Member] = {}
        known = {_ROOT + name for name in _PLAIN}
        for folder, config in ((_WEIGHTS, "model_weights_config.json"), (_CONSTANTS, "model_constants_config.json")):
            known.add(_ROOT + folder + config)
            for name, meta in json.loads(read(folder + config))["config"].items():
                prefix = "weight_" if folder == _WEIGHTS else "tensor_"
                if meta["use_pickle"] or not meta["path_name"].startswith(prefix):
                    raise ArtifactError(f"holds {name} as a pickled object, which could run anything: not read")
                member = _ROOT + folder + meta["path_name"]
                known.add(member)
                tensors[name] = Member(source.read(entries[member]), member, entries[member].compress_size)
        strange = sorted(entries.keys() - known)
        if strange or read("data/sample_inputs/model.pt"):
            raise ArtifactError(f"holds more than a program of this package: {strange or 'pickled inputs'}; not read")
        if read("byteorder") != b"little":
            raise ArtifactError("was written on a big-endian machine: export it again on a little-endian one")
        index = json.loads(read(f"extra/{INDEX}"))
    if index.get("version") not in _VERSIONS:
        raise ArtifactError(
            f"has version {index.get('version')!r} of the index, expected one of {_VERSIONS}: install the matching "
            "package"
        )
    return Archive(index, tensors)


def _pays(content: bytes) -> bool:
    """Whether deflating saves a fiftieth of the first megabyte."""
    sample = content[: 1 << 20]
    return len(zlib.compress(sample, 6)) < 0.98 * len(sample)
