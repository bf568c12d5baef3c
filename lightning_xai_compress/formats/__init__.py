"""Model and plan in, files out: one format a file, found through the registry."""

from lightning_xai_compress.formats import onnx, packed
from lightning_xai_compress.formats.packed import load_compressed, packed_size
from lightning_xai_compress.formats.registry import FORMATS, Artifact, Inputs, check_formats, register, save

__all__ = [
    "FORMATS",
    "Artifact",
    "Inputs",
    "check_formats",
    "load_compressed",
    "onnx",
    "packed",
    "packed_size",
    "register",
    "save",
]
