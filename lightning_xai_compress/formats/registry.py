"""The registry of file formats: one file of this folder each, found by its name.

A format turns a model whose parameters already hold the compressed values, and the plan that says so, into one file;
proves that the file is the model; and reads back what a file holds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.plan import CompressionPlan

__all__ = [
    "FORMATS",
    "Artifact",
    "Checker",
    "Contents",
    "Files",
    "Format",
    "Inputs",
    "Reader",
    "Stored",
    "Writer",
    "check_formats",
    "check_plan",
    "file_format",
    "register",
    "save",
    "write_atomically",
]

ONNX_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Inputs:
    """One call of the model: what stands between the brackets of `model(...)`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Files:
    """How files are written.

    Args:
        onnx_bits: Integer types that the ONNX file may hold, of 2, 4 and 8: a weight takes the narrowest that holds
            its width. OpenVINO 2026.4 refuses INT2: give (4, 8) for it.
        activations: "int8": the ONNX file computes with 8-bit activations, their ranges taken from calibration inputs;
            None: with floats, exact to rounding.
        ranges: How a range is chosen: "minmax", "percentile" (99.99 % of the values) or "mse" (least squared error).
        float16: Round what is not quantized (biases, BatchNorm, buffers) to float16 in the model when it is finished,
            where that keeps it finite and normal, so that the packed file holds half the bytes and stays exact.
        merge_batchnorm: Files hold tracked, affine BatchNorm layers with mean 0 and variance 1, which cost nothing in
            the packed file, and weights and biases that make up for it: the same outputs in evaluation, to rounding.
            The module keeps its own values. A file of this kind is for inference: in training, layers normalize by
            their batch, for which the merged weights are wrong; train on from a checkpoint instead.

    Raises:
        ValueError: A setting out of range.
    """

    onnx_bits: Sequence[int] = ONNX_BITS
    activations: Literal["int8"] | None = None
    ranges: Literal["minmax", "percentile", "mse"] = "minmax"
    float16: bool = False
    merge_batchnorm: bool = False

    def __post_init__(self) -> None:
        widths = tuple(self.onnx_bits) if isinstance(self.onnx_bits, Sequence) else ()
        if not widths or sorted(set(widths) & set(ONNX_BITS)) != list(widths):
            raise ValueError(f"onnx_bits must be some of {ONNX_BITS}, ascending, got {self.onnx_bits!r}")
        if self.activations not in (None, "int8"):
            raise ValueError(f"activations must be None or 'int8', got {self.activations!r}")
        if self.ranges not in ("minmax", "percentile", "mse"):
            raise ValueError(f"ranges must be 'minmax', 'percentile' or 'mse', got {self.ranges!r}")
        for name in ("float16", "merge_batchnorm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Args:
        name: As in the state dict.
        values: Dequantized.
        bits: Width in the file -> rows of that width (output channels, or groups of input channels in them); empty for
            what is not quantized.
        bytes: Its place in the file, without names and the like; 0 where another tensor's place is shared.
    """

    name: str
    values: Tensor
    bits: Mapping[int, int]
    bytes: int


@dataclass(frozen=True)
class Contents:
    """What a file holds: its tensors, and where it comes from (versions and the like)."""

    tensors: tuple[Stored, ...]
    provenance: Mapping[str, str] = field(default_factory=dict)


Writer = Callable[[nn.Module, CompressionPlan, Path, Sequence[Inputs], Files], None]
Checker = Callable[[Path, nn.Module, Sequence[Inputs], Files], float]
Reader = Callable[[Path], Contents]


@dataclass(frozen=True)
class Format:
    """A file format.

    Args:
        name: What the user writes in `formats=`.
        filename: Name of the file in the export folder.
        write: Writes the file at the given path.
        check: Proves a file: returns the largest difference between the model and what the file gives back, over all
            weights, or over the outputs relative to the largest one. Raises ArtifactError where it is too large.
        read: Tells what a file holds.
        needs: Modules that must be importable.
        extra: The extra of this package that brings them.
        traces: Whether it traces the model, and so needs example inputs.
    """

    name: str
    filename: str
    write: Writer
    check: Checker
    read: Reader
    needs: tuple[str, ...] = ()
    extra: str = ""
    traces: bool = False


@dataclass(frozen=True)
class Artifact:
    """A written file: what it is, where, how large, and how exactly it gives the model back."""

    format: str
    path: str
    bytes: int
    sha256: str
    max_abs_diff: float


FORMATS: dict[str, Format] = {}


def register(entry: Format) -> None:
    """Make a format known by its name."""
    FORMATS[entry.name] = entry


def check_formats(names: Sequence[str]) -> None:
    """Refuse unknown formats, and formats whose libraries are not installed.

    Raises:
        ValueError: No such format.
        ImportError: The extra that the format needs is not installed.
    """
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"formats: expected some of {sorted(FORMATS)}, got {name!r}")
        missing = [module for module in FORMATS[name].needs if importlib.util.find_spec(module) is None]
        if missing:
            raise ImportError(
                f"format {name!r} needs {', '.join(missing)}: "
                f"pip install 'lightning-xai-compress[{FORMATS[name].extra}]'"
            )


def file_format(path: str | Path) -> Format:
    """Find the format of a file by the end of its name.

    Raises:
        ArtifactError: No format writes such files.
    """
    suffix = Path(path).suffix
    for entry in FORMATS.values():
        if suffix and entry.filename.endswith(suffix):
            return entry
    known = ", ".join(sorted(Path(entry.filename).suffix for entry in FORMATS.values()))
    raise ArtifactError(f"{path}: expected a file that ends in one of {known}; rename it to what it was exported as")


def check_plan(model: nn.Module, plan: CompressionPlan) -> None:
    """Refuse a plan of another model.

    Raises:
        ArtifactError: It names parameters that the model lacks.
    """
    state = model.state_dict()
    quantized = plan.allocation.bits if plan.allocation else {}
    missing = sorted({*quantized, *plan.mask.keep} - state.keys())
    if missing:
        raise ArtifactError(
            f"the plan names what {type(model).__name__} lacks: {', '.join(missing[:4])}; "
            "save the model that the plan is of"
        )


def save(
    model: nn.Module,
    plan: CompressionPlan,
    directory: str | Path,
    *,
    formats: Sequence[str] = ("safetensors",),
    examples: Sequence[Inputs] = (),
    files: Files | None = None,
    on_written: Callable[[Artifact], None] | None = None,
) -> list[Artifact]:
    """Write a compressed model, one file a format; an old file stays until the new one is complete and proven.

    Args:
        model: Its parameters hold the masked, quantized values that `plan` describes.
        plan: What was decided.
        directory: Folder, made where it is missing.
        formats: Names out of `FORMATS`.
        examples: Model inputs: "onnx" and "pt2" trace the first and are checked on all; with 8-bit activations ranges
            are taken over all.
        files: How they are written.
        on_written: Called after each file.

    Raises:
        ValueError: No such format.
        ImportError: The extra that a format needs is not installed.
        ArtifactError: The plan is of another model; the file could not be made, or does not give the model back.
    """
    check_formats(formats)
    check_plan(model, plan)
    files = files or Files()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    artifacts = []
    for name in formats:
        entry = FORMATS[name]
        target = directory / entry.filename
        differences: list[float] = []

        def write(path: Path, entry: Format = entry, differences: list[float] = differences) -> None:
            entry.write(model, plan, path, examples, files)
            differences.append(entry.check(path, model, examples, files))

        content = write_atomically(target, write)
        artifact = Artifact(name, str(target), len(content), hashlib.sha256(content).hexdigest(), differences[0])
        artifacts.append(artifact)
        if on_written is not None:
            on_written(artifact)
    return artifacts


def write_atomically(target: Path, write: Callable[[Path], object]) -> bytes:
    """Let a file be written beside the target and put it in its place when it is complete and on the disk.

    A full disk or a killed process leaves the old file or none.

    Args:
        target: Its folder exists.
        write: Writes the file at the path that it is given, which ends as the target does.

    Returns:
        Its content.

    Raises:
        ArtifactError: It cannot be written.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=f".part{target.suffix}")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        content = temporary.read_bytes()
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise ArtifactError(f"{target} could not be written: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return content
