"""Model inputs that are named on the command line."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_xai_compress.formats import Inputs

__all__ = ["find_inputs", "inputs_of_file", "inputs_of_shapes", "parse_shape"]

_UNREADABLE = (ValueError, TypeError, LookupError, OSError, EOFError, zipfile.BadZipFile, zlib.error)
_DTYPES = {"f32": torch.float32, "i64": torch.int64}


def find_inputs(model: nn.Module, file: str | None, shapes: Sequence[str]) -> Inputs:
    """Take the inputs from a file, from shapes, or from the module's `example_input_array`.

    Raises:
        ValueError: None of them, or they cannot be read.
    """
    if file is not None:
        return inputs_of_file(Path(file))
    if shapes:
        return inputs_of_shapes(shapes)
    example = getattr(model, "example_input_array", None)
    if isinstance(example, Mapping):
        return Inputs((), dict(example))
    if example is not None:
        return Inputs(tuple(example) if isinstance(example, tuple | list) else (example,))
    raise ValueError(
        f"onnx and pt2 trace {type(model).__name__} with an input, but there is none: give --inputs FILE (.npy, .npz "
        "or .safetensors), or --input-shape 1,3,32,32, or set example_input_array on the LightningModule"
    )


def inputs_of_file(path: Path) -> Inputs:
    """Read one call: a single array from .npy; arrays by argument name from .npz and .safetensors.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another kind of file, or a damaged one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--inputs: expected a file, got {path}, which is none")
    try:
        if path.suffix == ".npy":
            return Inputs((torch.from_numpy(np.load(path, allow_pickle=False)),))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return Inputs((), {name: torch.from_numpy(arrays[name]) for name in arrays.files})
        if path.suffix == ".safetensors":
            return Inputs((), dict(load_file(path)))
    except (*_UNREADABLE, SafetensorError) as error:
        raise ValueError(f"--inputs {path} cannot be read: {error}; save plain arrays of numbers") from error
    raise ValueError(f"--inputs: expected .npy, .npz or .safetensors, got {path}; save the arrays as one of these")


def inputs_of_shapes(shapes: Sequence[str]) -> Inputs:
    """Make one call of seeded normal values, or of zeros for "i64:"; one argument a shape."""
    generator = torch.Generator().manual_seed(0)
    args: list[Tensor] = []
    for text in shapes:
        dtype, shape = parse_shape(text)
        integer = not dtype.is_floating_point
        try:
            args.append(torch.zeros(shape, dtype=dtype) if integer else torch.randn(shape, generator=generator))
        except RuntimeError as error:
            raise ValueError(f"--input-shape {text} does not fit into memory: give a smaller one") from error
    return Inputs(tuple(args))


def parse_shape(text: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Read "1,3,32,32" (float32) or "i64:1,16".

    Raises:
        ValueError: Anything else.
    """
    kind, colon, sizes = text.rpartition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(","))
        dtype = _DTYPES[kind if colon else "f32"]
    except (ValueError, KeyError):
        shape, dtype = (), torch.float32
    if not shape or min(shape) < 1:
        raise ValueError(f"expected a shape such as 1,3,32,32, or i64:1,16 for token ids, got {text!r}")
    return dtype, shape
