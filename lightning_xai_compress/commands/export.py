"""`export`: the files of a checkpoint, without training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from lightning_xai_compress.commands.checkpoints import build_model, load_checkpoint, parse_settings
from lightning_xai_compress.commands.inputs import find_inputs
from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import FORMATS, Artifact, Files, Inputs, check_formats, round_to_float16, save
from lightning_xai_compress.tables import table

__all__ = ["export"]


def export(arguments: argparse.Namespace) -> int:
    """Write all files that can be written, and say why others could not."""
    from lightning_xai_compress.callbacks.checkpoint import plan_of  # brings Lightning, which `inspect` can do without

    formats: Sequence[str] = list(dict.fromkeys(arguments.format))
    check_formats(formats)
    files = Files(
        onnx_bits=arguments.onnx_bits,
        activations=arguments.activations,
        ranges=arguments.ranges,
        float16=arguments.float16,
    )
    if files.activations and "onnx" not in formats:
        raise ValueError("--activations is a way to write ONNX: add onnx to --format, or leave --activations out")
    if files.activations and arguments.input_shape:
        raise ValueError(
            "--activations takes ranges from inputs, and random ones would give wrong ranges: give real ones with "
            "--inputs FILE instead of --input-shape"
        )
    path = Path(arguments.checkpoint)
    checkpoint = load_checkpoint(path, trust=arguments.trust)
    plan = plan_of(checkpoint)
    model = build_model(
        arguments.model, path, checkpoint, settings=parse_settings(arguments.init), trust=arguments.trust
    )
    examples = _examples(model, formats, arguments)
    rounded = round_to_float16(model, set(plan.mask.keep)) if files.float16 else []
    plan = replace(
        plan,
        skipped=(*plan.skipped, *(entry for entry in rounded if entry not in plan.skipped)),
        provenance={"model": type(model).__qualname__, **plan.provenance},
    )
    artifacts: list[Artifact] = []
    failed = False
    for name in formats:
        try:
            artifacts += save(model, plan, arguments.output, formats=[name], examples=examples, files=files)
        except ArtifactError as error:  # one format must not cost the user the others
            failed = True
            print(f"error: {name} was not written: {error}", file=sys.stderr)
    if artifacts:
        rows = [(each.path, f"{each.bytes:,}", f"{each.max_abs_diff:.2g}") for each in artifacts]
        print(table(("file", "bytes", "max abs diff"), rows))
    return int(failed)


def _examples(model: nn.Module, formats: Sequence[str], arguments: argparse.Namespace) -> list[Inputs]:
    if not any(FORMATS[name].traces for name in formats):
        return []
    return [find_inputs(model, arguments.inputs, arguments.input_shape)]
