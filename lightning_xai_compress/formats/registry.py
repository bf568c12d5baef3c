"""The registry of file formats: one file of this folder each, found by its name.

A format turns a model whose parameters already hold the compressed values, and the plan that says so, into one file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.plan import CompressionPlan

__all__ = ["FORMATS", "Artifact", "Format", "Inputs", "check_formats", "register", "save"]


@dataclass(frozen=True)
class Inputs:
    """One call of the model: what stands between the brackets of `model(...)`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None


Writer = Callable[[nn.Module, CompressionPlan, Path, Sequence[Inputs]], float]


@dataclass(frozen=True)
class Format:
    """A file format.

    Args:
        name: What the user writes in `formats=`.
        filename: Name of the file in the export folder.
        write: Writes the file at the given path and proves it: returns the largest difference between the model and
            what the file gives back (over all weights, or over the logits relative to the largest one).
        needs: Modules that must be importable, and the extra of this package that brings them.
        extra: Name of that extra.
    """

    name: str
    filename: str
    write: Writer
    needs: tuple[str, ...] = ()
    extra: str = ""


@dataclass(frozen=True)
class Artifact:
    """A written file: what it is, where, how large, and how exactly it gives the model back."""

    format: str
    path: str
    bytes: int
    sha256: str
    max_abs_diff: float


FORMATS: dict[str, Format] = {}


def register(name: str, *, filename: str, needs: tuple[str, ...] = (), extra: str = "") -> Callable[[Writer], Writer]:
    """Register a writer as a format."""

    def decorate(write: Writer) -> Writer:
        FORMATS[name] = Format(name, filename, write, needs, extra)
        return write

    return decorate


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


def save(
    model: nn.Module,
    plan: CompressionPlan,
    directory: str | Path,
    *,
    formats: Sequence[str] = ("safetensors",),
    examples: Sequence[Inputs] = (),
    on_written: Callable[[Artifact], None] | None = None,
) -> list[Artifact]:
    """Write a compressed model, one file a format; an old file stays until the new one is complete.

    Args:
        model: Its parameters hold the masked, quantized values that `plan` describes.
        plan: What was decided.
        directory: Folder, made where it is missing.
        formats: Names out of `FORMATS`.
        examples: A few model inputs; "onnx" traces the first and is checked on all.
        on_written: Called after each file.

    Raises:
        ValueError: No such format.
        ImportError: The extra that a format needs is not installed.
        ArtifactError: The file could not be made, or does not give the model back.
    """
    check_formats(formats)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    artifacts = []
    for name in formats:
        target = directory / FORMATS[name].filename
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{target.name}.", suffix=".part")
        os.close(handle)
        try:
            difference = FORMATS[name].write(model, plan, Path(temporary), examples)
            content = Path(temporary).read_bytes()
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except OSError as error:
            raise ArtifactError(f"{target} could not be written: {error}") from error
        finally:
            Path(temporary).unlink(missing_ok=True)
        artifact = Artifact(name, str(target), len(content), hashlib.sha256(content).hexdigest(), difference)
        artifacts.append(artifact)
        if on_written is not None:
            on_written(artifact)
    return artifacts
