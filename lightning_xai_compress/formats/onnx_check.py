"""Running an ONNX file, and proving that it is the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.registry import Files, Inputs
from lightning_xai_compress.formats.tracing import calls, check_examples, evaluation, named_inputs, to_device

__all__ = ["ACTIVATIONS", "INT8_TOLERANCE", "TOLERANCE", "OnnxModule", "check_onnx", "compare", "onnx_session"]

TOLERANCE = 1e-4
"""Largest difference from the model, relative to its largest output, at which a file still counts as the model."""

INT8_TOLERANCE = 0.5
"""The same with 8-bit activations, whose ranges were measured: beyond it the file is of no use."""

ACTIVATIONS = "activations"
"""Metadata key that says "int8" where activations are of 8 bits."""


def check_onnx(path: Path, model: nn.Module, examples: Sequence[Inputs], files: Files | None = None) -> float:
    """Prove that onnxruntime computes from a file what the model does.

    Returns:
        Largest absolute difference of an output, relative to the largest value of that output.

    Raises:
        ArtifactError: It does not run, or an output differs by more than `TOLERANCE`; with 8-bit activations by more
            than `INT8_TOLERANCE`.
    """
    check_examples("onnx", examples)
    with evaluation(model):
        inputs, expected = calls(model, [to_device(model, example) for example in examples])
    return compare(path, inputs, expected)


def onnx_session(path: str | Path, *, threads: int = 0) -> Any:
    """Open a written file with onnxruntime on the CPU, with the options that make it fastest.

    Float activations: weights are dequantized once, at loading, and stay exact; with default options outputs are the
    same, but the weights are dequantized in every run, which is slower. 8-bit activations: the default options.

    Args:
        path: The file.
        threads: Within an operator; 0: as many as there are cores.

    Returns:
        An `onnxruntime.InferenceSession`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # were a product with quantized weights fused all the same: with float activations, not rounded to 8 bits
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if not _is_int8(session):
        return session
    plain = onnxruntime.SessionOptions()  # integer kernels need what is disabled above
    plain.intra_op_num_threads = threads
    plain.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), plain, providers=["CPUExecutionProvider"])


class OnnxModule(nn.Module):
    """A file as a module: what onnxruntime computes from it, for metrics and comparisons.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.session = onnx_session(path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The only output, or a tuple of all; inputs in the order of the file's."""
        tensors = named_inputs(self, Inputs(args, kwargs)).values()
        names = [entry.name for entry in self.session.get_inputs()]
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        outputs = tuple(torch.from_numpy(each).to(_device(tensors)) for each in self.session.run(None, feed))
        return outputs[0] if len(outputs) == 1 else outputs


def _device(tensors: Iterable[Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _is_int8(session: Any) -> bool:
    return bool(session.get_modelmeta().custom_metadata_map.get(ACTIVATIONS) == "int8")


def compare(path: Path, inputs: Sequence[Mapping[str, Tensor]], expected: Sequence[Mapping[str, Tensor]]) -> float:
    """Run a file on all examples.

    Args:
        path: The file.
        inputs: Named inputs of each example, in the order of the file's.
        expected: The model's outputs.

    Returns:
        Largest absolute difference of an output, relative to the largest value of that output.

    Raises:
        ArtifactError: It does not run, or differs by more than `TOLERANCE` (or four roundings of a half precision
            output), with 8-bit activations by more than `INT8_TOLERANCE`; or no output is finite.
    """
    try:
        session = onnx_session(path)
        names = [entry.name for entry in session.get_inputs()]  # in the order of ours, of which one may be renamed
        outputs = [entry.name for entry in session.get_outputs()]
        feeds = [(tensor.cpu().numpy() for tensor in entry.values()) for entry in inputs]
        got = [session.run(outputs, dict(zip(names, feed, strict=True))) for feed in feeds]
    except Exception as error:  # onnxruntime raises types of its own
        raise ArtifactError(f"onnxruntime cannot run the ONNX file on the examples: {error}") from error
    worst = 0.0
    for position, name in enumerate(expected[0]):
        pairs = [(torch.as_tensor(run[position]), entry[name].cpu()) for run, entry in zip(got, expected, strict=True)]
        for ours, theirs in pairs:
            if ours.shape != theirs.shape:
                raise ArtifactError(f"{name}: the ONNX file gives {tuple(ours.shape)}, the model {tuple(theirs.shape)}")
        if not any(bool(theirs.isfinite().any()) for _, theirs in pairs):
            raise ArtifactError(
                f"{name}: the model gives no finite number on the examples, so they prove nothing: give other inputs"
            )
        dtype = pairs[0][1].dtype
        rounding = 4 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0  # of half precision: 4e-3
        allowed = INT8_TOLERANCE if _is_int8(session) else max(TOLERANCE, rounding)
        largest = max(_largest(theirs.double()) for _, theirs in pairs)
        difference = max(_gap(ours.double(), theirs.double()) for ours, theirs in pairs)
        relative = difference / largest if largest else difference
        if relative > allowed:
            raise ArtifactError(
                f"{name}: the ONNX file differs from the model by {difference:.3g}, which is {relative:.3g} of the "
                f"largest value, {largest:.3g}; allowed are {allowed:g}. {_way_out(session)}"
            )
        worst = max(worst, relative)
    return worst


def _way_out(session: Any) -> str:
    if _is_int8(session):
        return "Choose other ranges, give more inputs to measure them on, or leave 8-bit activations out"
    return "Leave 'onnx' out of formats, or export again if the model has changed since"


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; infinite where only one is finite, none where both are the same infinity or NaN."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    gap = (ours - theirs).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))[~same]
    return float(gap.max()) if gap.numel() else 0.0
