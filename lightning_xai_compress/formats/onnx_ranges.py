"""Ranges of activations: the float graph runs on calibration inputs, and its intermediate values are watched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_xai_compress.errors import ArtifactError

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["LEVELS", "RANGES", "Range", "activation_ranges", "grid"]

Range = tuple[float, float]
"""Smallest and largest value that are told apart; what lies outside is clipped."""

RANGES = ("minmax", "percentile", "mse")

LEVELS = 255
"""Steps of an 8-bit grid."""

_TAIL = 0.00005  # of the values, cut off at either end
_BINS = 8192
_SHRINKS = np.arange(1, 101) / 100
_AT_ONCE = 8  # tensors that are held in memory together
_STEP_OF_NOTHING = 2.0**-20  # of what is always zero: small, since the bias after it is rounded to a multiple
_SMALLEST_STEP = float(np.finfo(np.float32).tiny)


def activation_ranges(
    proto: ModelProto, names: Sequence[str], feeds: Sequence[Mapping[str, NDArray[Any]]], *, ranges: str = "minmax"
) -> dict[str, Range]:
    """Find the range of each tensor over all calibration inputs.

    Args:
        proto: Float graph; left as it was.
        names: Its float tensors: inputs, or outputs of nodes.
        feeds: Inputs by name, one mapping a run.
        ranges: "minmax": all values; "percentile": the middle 99.99 % of them; "mse": the range at whose 8-bit grid the
            squared error of the values is least.

    Returns:
        Name -> range, which always holds zero; of width zero where all values are zero. A tensor without a single value
        counts as zero.

    Raises:
        ValueError: There are no feeds, or the method is unknown.
        ArtifactError: A value is not finite, or onnxruntime cannot run the graph on the feeds.
    """
    if ranges not in RANGES:
        raise ValueError(f"ranges must be one of {RANGES}, got {ranges!r}")
    if not feeds:
        raise ValueError("8-bit activations need calibration inputs, got none: pass at least one")
    found: dict[str, Range] = dict.fromkeys(names, (0.0, 0.0))
    session = _Watched(proto, names)
    for name, values in session.runs(names, feeds):
        if values.size:
            low, high = float(values.min()), float(values.max())
            if not (np.isfinite(low) and np.isfinite(high)):
                raise ArtifactError(
                    f"the values of {name!r} are not all finite on the calibration inputs ({low:g} to {high:g}), so "
                    "they have no 8-bit range: check these inputs and the weights, or leave activations=None"
                )
            found[name] = (min(found[name][0], low), max(found[name][1], high))
    if ranges == "minmax":
        return found
    counts = {name: np.zeros(_BINS, np.int64) for name in names if found[name][0] < found[name][1]}
    for name, values in session.runs(list(counts), feeds):
        counts[name] += np.histogram(values, bins=_BINS, range=found[name])[0]
    choose = _percentile if ranges == "percentile" else _least_squares
    return found | {name: choose(counts[name], found[name]) for name in counts}


def grid(bounds: Range) -> tuple[np.float32, np.uint8]:
    """Step and zero point of the 8-bit grid of a range; zero is exactly on it.

    Args:
        bounds: A range that holds zero.
    """
    low, high = bounds
    if low == high:
        return np.float32(_STEP_OF_NOTHING), np.uint8(0)
    return np.float32(max((high - low) / LEVELS, _SMALLEST_STEP)), np.uint8(round(-low * LEVELS / (high - low)))


class _Watched:
    """The float graph with tensors from its middle as further outputs, a few of which are read in a run."""

    def __init__(self, proto: ModelProto, names: Sequence[str]) -> None:
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        watched = onnx.ModelProto()
        watched.CopyFrom(proto)
        known = {entry.name for entry in (*watched.graph.input, *watched.graph.output)}
        self.inputs = {entry.name for entry in proto.graph.input}
        watched.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in known
        )
        self._session = self._try(
            lambda: onnxruntime.InferenceSession(
                watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        )

    def runs(
        self, names: Sequence[str], feeds: Sequence[Mapping[str, NDArray[Any]]]
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the values of each tensor in each run."""
        inside = [name for name in names if name not in self.inputs]
        for feed in feeds:
            yield from ((name, np.asarray(feed[name])) for name in names if name in self.inputs)
            for start in range(0, len(inside), _AT_ONCE):
                chunk = inside[start : start + _AT_ONCE]
                results = self._try(lambda chunk=chunk, feed=feed: self._session.run(chunk, dict(feed)))
                yield from zip(chunk, results, strict=True)

    @staticmethod
    def _try(action: Any) -> Any:
        try:
            return action()
        except Exception as error:  # onnxruntime raises types of its own
            raise ArtifactError(f"onnxruntime cannot run the graph on the calibration inputs: {error}") from error


def _percentile(counts: NDArray[np.int64], bounds: Range) -> Range:
    """Cut an equal share off both ends."""
    edges = np.linspace(*bounds, len(counts) + 1)
    tail = _TAIL * counts.sum()
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])
    low = edges[int(np.searchsorted(below, tail, side="right"))]
    high = edges[len(counts) - int(np.searchsorted(above, tail, side="right"))]
    return min(float(low), 0.0), max(float(high), 0.0)


def _least_squares(counts: NDArray[np.int64], bounds: Range) -> Range:
    """Shrink one end after the other for as long as the squared error falls."""
    edges = np.linspace(*bounds, len(counts) + 1)
    used = counts > 0
    centers, weights = ((edges[:-1] + edges[1:]) / 2)[used], counts[used]

    def error(low: float, high: float) -> float:
        step, zero = grid((low, high))
        codes = np.clip(np.rint(centers / step) + zero, 0, LEVELS)
        return float((weights * ((codes - zero) * step - centers) ** 2).sum())

    best = bounds
    for _ in range(3):
        before = best
        best = min(((best[0], bounds[1] * shrink) for shrink in _SHRINKS), key=lambda ends: error(*ends))
        best = min(((bounds[0] * shrink, best[1]) for shrink in _SHRINKS), key=lambda ends: error(*ends))
        if best == before:
            break
    return best
