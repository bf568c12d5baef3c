"""Model and plan in, files out: one format a file, found through the registry."""

from lightning_xai_compress.formats import onnx, packed
from lightning_xai_compress.formats.packed import load_compressed, packed_size
from lightning_xai_compress.formats.registry import (
    FORMATS,
    Artifact,
    Contents,
    Files,
    Format,
    Inputs,
    Stored,
    check_formats,
    file_format,
    register,
    save,
    write_atomically,
)

__all__ = [
    "FORMATS",
    "Artifact",
    "Contents",
    "Files",
    "Format",
    "Inputs",
    "Stored",
    "check_formats",
    "file_format",
    "load_compressed",
    "onnx",
    "packed",
    "packed_size",
    "register",
    "save",
    "write_atomically",
]
