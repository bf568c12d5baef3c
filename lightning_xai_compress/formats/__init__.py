"""Model and plan in, files out: one format a file, found through the registry."""

from lightning_xai_compress.formats import onnx, packed, pt2
from lightning_xai_compress.formats.finishing import finished, round_module
from lightning_xai_compress.formats.packed import code_entropy, load_compressed, packed_size
from lightning_xai_compress.formats.prices import entropy_price
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
from lightning_xai_compress.formats.resizing import structure_text
from lightning_xai_compress.formats.rounding import round_to_float16
from lightning_xai_compress.formats.tracing import check_call, check_traceable

__all__ = [
    "FORMATS",
    "Artifact",
    "Contents",
    "Files",
    "Format",
    "Inputs",
    "Stored",
    "check_call",
    "check_formats",
    "check_traceable",
    "code_entropy",
    "entropy_price",
    "file_format",
    "finished",
    "load_compressed",
    "onnx",
    "packed",
    "packed_size",
    "pt2",
    "register",
    "round_module",
    "round_to_float16",
    "save",
    "structure_text",
    "write_atomically",
]
