"""Checkpoints and models that are named on the command line."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError

__all__ = ["build_model", "load_checkpoint", "parse_settings"]


def load_checkpoint(path: Path, *, trust: bool = False) -> Mapping[str, Any]:
    """Load a checkpoint onto the CPU; without `trust`, nothing in it is run.

    Raises:
        FileNotFoundError: No such file.
        ArtifactError: It holds types that could run anything, or is no checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint, got {path}, which is no file: give one of ModelCheckpoint's")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        text = str(error)
        refused = re.search(r"GLOBAL (\S+)", text) or re.search(r"(Unsupported (?:class|operand)[^\n.]*)", text)
        if refused is None:
            raise ArtifactError(_damaged(path, error)) from error
        raise ArtifactError(
            f"{path} holds {refused.group(1)}, expected tensors and plain types: other types could "
            "run any code while they are loaded. If you trust the file, add --trust; else save no objects with "
            "save_hyperparameters() and callbacks"
        ) from error
    except Exception as error:  # torch, zipfile and pickle raise what they meet
        raise ArtifactError(_damaged(path, error)) from error
    if not isinstance(checkpoint, Mapping):
        raise ArtifactError(f"{path}: expected a Lightning checkpoint, got a {type(checkpoint).__name__}; give a .ckpt")
    return checkpoint


def build_model(
    name: str, path: Path, checkpoint: Mapping[str, Any], *, settings: Mapping[str, Any], trust: bool = False
) -> nn.Module:
    """Build the model of a checkpoint and fill it.

    Args:
        name: "module:Class", importable from the current directory: a LightningModule (built by its
            load_from_checkpoint), another module, or a function that returns one.
        path: The checkpoint.
        checkpoint: The same, loaded.
        settings: Arguments of the class beside those that the checkpoint has as hyperparameters.
        trust: As for `load_checkpoint`.

    Raises:
        ValueError: There is no such class, or it cannot be built with these settings.
        ArtifactError: The checkpoint is of another model.
    """
    make = _find(name)
    try:
        if hasattr(make, "load_from_checkpoint"):
            model = make.load_from_checkpoint(path, map_location="cpu", weights_only=not trust, **settings)
        else:
            model = make(**settings)
    except RuntimeError as error:
        raise ArtifactError(_another(name, path, error)) from error
    except Exception as error:  # whatever the user's class raises
        raise ValueError(
            f"{name} cannot be built: {_first_line(error)}; give what its __init__ needs as --init name=value (JSON), "
            "or call save_hyperparameters() in it before the fit"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name}: expected a torch.nn.Module, got a {type(model).__name__}; name its class")
    if not hasattr(make, "load_from_checkpoint"):
        _fill(model, name, path, checkpoint["state_dict"])
    return model


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Read name=value pairs; a value that is no JSON is text.

    Raises:
        ValueError: One without "=".
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--init: expected name=value, got {setting!r}; write for example --init width=64")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


def _find(name: str) -> Callable[..., Any]:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"--model: expected module:Class, got {name!r}; for models.py with class Net write models:Net")
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"--model {name}: module {module_name!r} cannot be imported from {directory}: {error}; change to the "
            "folder that holds it"
        ) from error
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"--model {name}: {module_name!r} fails to import: {_first_line(error)}; mend it") from error
    for step in attribute.split("."):
        if not hasattr(found, step):
            raise ValueError(f"--model {name}: {module_name} has no {attribute!r}; it has {_classes(found)}")
        found = getattr(found, step)
    if not callable(found):
        raise ValueError(f"--model {name}: expected a class, got a {type(found).__name__}; name the class of the model")
    made: Callable[..., Any] = found
    return made


def _classes(module: object) -> str:
    names = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    return ", ".join(sorted(names)) or "no modules"


def _fill(model: nn.Module, name: str, path: Path, state: Mapping[str, Any]) -> None:
    own = model.state_dict().keys()
    if own != state.keys():
        lacking, more = sorted(own - state.keys()), sorted(state.keys() - own)
        raise ArtifactError(
            f"{path} is of another model than {name}: the checkpoint has {_few(more)}, {name} has {_few(lacking)}; "
            "give the LightningModule of the fit, whose names these are"
        )
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ArtifactError(_another(name, path, error)) from error


def _another(name: str, path: Path, error: Exception) -> str:
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return f"{path} is of another model than {name}: {' '.join(lines[:3])}; give the class and settings of the fit"


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path}: expected a checkpoint, got a file that torch.load cannot read ({_first_line(error)}); copy it again"
    )


def _few(names: Sequence[str]) -> str:
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "no others"


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}"[:300]
