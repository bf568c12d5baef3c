"""Arguments of the command line, and errors in one line instead of a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from lightning_xai_compress.commands.export import export
from lightning_xai_compress.commands.inputs import parse_shape
from lightning_xai_compress.commands.inspection import inspect
from lightning_xai_compress.commands.verify import verify
from lightning_xai_compress.errors import CompressionError
from lightning_xai_compress.formats import FORMATS

__all__ = ["main"]

_EPILOG = """exit codes:
  0  done; for verify: the same
  1  it could not be done (the error says why); for verify: it differs
  2  the arguments are wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Its arguments; those of the process where None.

    Returns:
        Exit code: 0 done, 1 failed or different, 2 wrong arguments.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (CompressionError, ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_xai_compress",
        description="Export, inspect and verify compressed models without training.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    again = commands.add_parser(
        "export",
        help="write the files of a Lightning checkpoint again",
        description="Write the model of a Lightning checkpoint (.ckpt of a compressed fit) as files, each checked.",
    )
    again.add_argument("checkpoint", help="what ModelCheckpoint or trainer.save_checkpoint wrote")
    _add_model(again, required=True)
    again.add_argument(
        "--format", nargs="+", choices=sorted(FORMATS), default=["safetensors"], help="default: safetensors"
    )
    again.add_argument(
        "--output", default="compressed", metavar="DIR", help="folder for the files; default: compressed"
    )
    _add_inputs(again)
    again.add_argument(
        "--onnx-bits",
        type=_widths,
        default=(2, 4, 8),
        metavar="4,8",
        help="integer types in the ONNX file; default: 2,4,8",
    )
    again.add_argument("--activations", choices=["int8"], help="8-bit activations in the ONNX file; needs real inputs")
    again.add_argument(
        "--ranges", choices=["minmax", "percentile", "mse"], default="minmax", help="how their ranges are chosen"
    )
    again.add_argument("--float16", action="store_true", help="round what is not quantized to float16")
    again.set_defaults(run=export)

    look = commands.add_parser(
        "inspect",
        help="tell what a file holds",
        description="Tell what a file holds: layers, widths, sparsity, bytes, origin. Nothing in it is run.",
    )
    look.add_argument("file", help="a file that was exported: .safetensors, .onnx or .pt2")
    look.add_argument("--json", action="store_true", help="print JSON instead of a table")
    look.set_defaults(run=inspect)

    prove = commands.add_parser(
        "verify",
        help="prove that a file is the model of a checkpoint",
        description="Compare a file with a checkpoint, tensor by tensor and bit for bit; with --model (which ONNX "
        "needs) also run it and compare outputs. Running a .pt2 means trusting it.",
    )
    prove.add_argument("file", help="a file that was exported: .safetensors, .onnx or .pt2")
    prove.add_argument("--against", required=True, metavar="CHECKPOINT", help="the Lightning checkpoint")
    _add_model(prove, required=False)
    _add_inputs(prove)
    prove.add_argument("--float16", action="store_true", help="the file was exported with --float16")
    prove.set_defaults(run=verify)
    return parser


def _add_model(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--model", required=required, metavar="MODULE:CLASS", help="the model, importable from the current folder"
    )
    parser.add_argument(
        "--init",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the class (JSON values) that the checkpoint does not have as hyperparameters",
    )
    parser.add_argument(
        "--trust", action="store_true", help="load checkpoints that hold more than tensors; these can run any code"
    )


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--inputs", metavar="FILE", help="inputs for onnx and pt2: .npy, or .npz or .safetensors by argument name"
    )
    group.add_argument(
        "--input-shape",
        nargs="+",
        type=_shape,
        default=[],
        metavar="1,3,32,32",
        help="random inputs of these shapes, one an argument; i64:1,16 for token ids (zeros)",
    )


def _shape(text: str) -> str:
    try:
        parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected widths such as 4,8, got {text!r}") from error
