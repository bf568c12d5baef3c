"""`inspect`: what a file holds, as tables or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_xai_compress.formats import Contents, Stored, file_format
from lightning_xai_compress.tables import table

__all__ = ["inspect"]


def inspect(arguments: argparse.Namespace) -> int:
    """Print the contents of a file."""
    path = Path(arguments.file)
    entry = file_format(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file, got {path}, which is none")
    contents = entry.read(path)
    summary = {"file": str(path), "format": entry.name, "bytes": path.stat().st_size} | _summary(contents)
    print(json.dumps(summary, indent=2) if arguments.json else _text(summary))
    return 0


def _summary(contents: Contents) -> dict[str, Any]:
    # a tensor that several names share counts once
    distinct = list({id(each.values): each for each in contents.tensors}.values())
    quantized = [each for each in distinct if each.bits]
    weights = sum(each.values.numel() for each in quantized)
    bits = sum(
        width * rows * (each.values.numel() // max(1, sum(each.bits.values())))
        for each in quantized
        for width, rows in each.bits.items()
    )
    zeros = sum(int((each.values == 0).sum()) for each in quantized)
    return {
        "totals": {
            "tensors": len(contents.tensors),
            "numbers": sum(each.values.numel() for each in distinct),
            "quantized": weights,
            "average_bits": round(bits / weights, 4) if weights else None,
            "sparsity": round(zeros / weights, 6) if weights else None,
            "tensor_bytes": sum(each.bytes for each in contents.tensors),
        },
        "layers": [_row(each) for each in contents.tensors if each.bits],
        "not_quantized": [_row(each) for each in contents.tensors if not each.bits],
        "provenance": dict(contents.provenance),
    }


def _row(stored: Stored) -> dict[str, Any]:
    values = stored.values
    return {
        "name": stored.name,
        "shape": list(values.shape),
        "dtype": str(values.dtype).removeprefix("torch."),
        "bits": {str(width): rows for width, rows in sorted(stored.bits.items())},
        "sparsity": round(int((values == 0).sum()) / max(1, values.numel()), 6),
        "bytes": stored.bytes,
    }


def _text(summary: dict[str, Any]) -> str:
    totals = summary["totals"]
    head = [f"{summary['file']}: {summary['format']}, {summary['bytes']:,} bytes"]
    head += [f"{totals['numbers']:,} numbers in {totals['tensors']} tensors, of {totals['tensor_bytes']:,} bytes"]
    if totals["quantized"]:
        head += [
            f"{totals['quantized']:,} are quantized, with {totals['average_bits']:.2f} bits on average; "
            f"{totals['sparsity']:.1%} of these are zero"
        ]
    parts = ["\n".join(head)]
    if summary["layers"]:
        rows = [
            (
                *(each["name"], _shape(each), f"{each['sparsity']:.1%}"),
                *(" ".join(f"{width}:{rows}" for width, rows in each["bits"].items()), f"{each['bytes']:,}"),
            )
            for each in summary["layers"]
        ]
        parts.append(table(("layer", "shape", "sparsity", "bits: rows", "bytes"), rows))
    if summary["not_quantized"]:
        floats: Sequence[Sequence[str]] = [
            (each["name"], _shape(each), each["dtype"], f"{each['sparsity']:.1%}", f"{each['bytes']:,}")
            for each in summary["not_quantized"]
        ]
        parts.append(table(("not quantized", "shape", "dtype", "sparsity", "bytes"), floats))
    if summary["provenance"]:
        parts.append("\n".join(f"{key}: {value}" for key, value in sorted(summary["provenance"].items())))
    return "\n\n".join(parts)


def _shape(row: dict[str, Any]) -> str:
    return "x".join(map(str, row["shape"])) or "scalar"
