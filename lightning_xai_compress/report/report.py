"""What became of the model: the noun that ends the pipeline."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_xai_compress.formats import Artifact, code_entropy, packed_size, write_atomically
from lightning_xai_compress.plan import CompressionPlan, Skipped
from lightning_xai_compress.report.measure import DenseSizes, dense_bytes, zstd_bytes

__all__ = ["LayerReport", "Measured", "PathPoint", "Report", "Sizes", "build_report"]


@dataclass(frozen=True)
class Measured:
    """One state of the model.

    Args:
        bytes: Size as a safetensors file.
        accuracy: Value of the metric; None where none is known.
        at_epoch: Epochs done in that state; None for the final one.
    """

    bytes: int
    accuracy: float | None = None
    at_epoch: float | None = None


@dataclass(frozen=True)
class PathPoint:
    """A state on the way, as a validation found it: where a budget is named, together a Pareto path.

    Args:
        epoch: Epochs done.
        bytes: Of the packed file that the state would have.
        metric: Its value; None where it is unknown.
        sparsity: Share of zeros by the mask.
        average_bits: Mean width; None before weights are quantized.
    """

    epoch: float
    bytes: int
    metric: float | None
    sparsity: float
    average_bits: float | None


@dataclass(frozen=True)
class LayerReport:
    """One compressible layer.

    Args:
        name: Parameter name.
        weights: Number of weights.
        sparsity: Share of them that is zero by the mask.
        bits: Width -> number of rows (output channels, or groups of input channels in them); empty where not
            quantized.
        bytes: Its share of the packed file.
        relevance: Its share of all absolute relevance at the latest scoring; None where unknown.
    """

    name: str
    weights: int
    sparsity: float
    bits: dict[int, int]
    bytes: int
    relevance: float | None


@dataclass(frozen=True)
class Sizes:
    """What the bytes compare with. All of real files, but for the entropy.

    Args:
        dense: Of the dense model.
        code_entropy: Zeroth-order entropy of each tensor's integer codes, in bytes: what a perfect coder that treats
            all weights of a tensor alike would need for them, without scales and all else.
        zstd: Each written file under zstd, by format.
    """

    dense: DenseSizes | None
    code_entropy: float
    zstd: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """Before and after.

    Args:
        dense: The state at which compression began.
        compressed: The final state.
        reduction: 1 - compressed bytes / dense bytes, both as safetensors files.
        sparsity: Zeros by the mask over all compressible weights.
        average_bits: Mean width over all compressible weights, pruned ones included; None where not quantized.
        metric: What `accuracy` is, and on which data.
        criterion: What weights were scored by.
        heatmaps: Picture, beside the report, of what the final model looks at in some training images; "" for none.
        artifacts: The written files.
        sizes: What their bytes compare with.
        failed: Formats that could not be written: name and reason.
        layers: One entry a compressible layer.
        skipped: What was left alone, wholly or in part, and why.
        positive_pruned: Pruned weights that had positive relevance when they went.
        halted: Why pruning stopped early; empty where it did not.
        int8_accuracy: Metric of the ONNX file with 8-bit activations, run by onnxruntime; None where not measured.
        exported_epoch: Of the exported weights, where they are the best ones and not the last.
        history: Each step as it happened.
        versions: Of the libraries that took part.
        budget: What became of the size or the accuracy that the user named; empty where none was.
        path: The states that validations found on the way to it.
    """

    dense: Measured
    compressed: Measured
    reduction: float
    sparsity: float
    average_bits: float | None
    metric: str
    artifacts: tuple[Artifact, ...]
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    criterion: str = ""
    heatmaps: str = ""
    failed: tuple[Skipped, ...] = ()
    positive_pruned: int = 0
    halted: str = ""
    sizes: Sizes | None = None
    exported_epoch: float | None = None
    int8_accuracy: float | None = None
    history: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    budget: str = ""
    path: tuple[PathPoint, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as `report.json` holds them."""
        result = asdict(self)
        del result["compressed"]["at_epoch"]
        for layer in result["layers"]:
            layer["bits"] = {str(width): rows for width, rows in layer["bits"].items()}
        return result

    def to_json(self) -> str:
        """As `report.json` holds it; numbers that are not finite are null."""
        return json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read what `write` wrote."""
        values = json.loads(path.read_text())
        sizes = values["sizes"]
        if sizes is not None:
            sizes = Sizes(**{**sizes, "dense": None if sizes["dense"] is None else DenseSizes(**sizes["dense"])})
        return cls(
            **{
                **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()},
                "dense": Measured(**values["dense"]),
                "compressed": Measured(**values["compressed"]),
                "artifacts": tuple(Artifact(**each) for each in values["artifacts"]),
                "layers": tuple(
                    LayerReport(**{**each, "bits": {int(width): count for width, count in each["bits"].items()}})
                    for each in values["layers"]
                ),
                "skipped": tuple(Skipped(**each) for each in values["skipped"]),
                "failed": tuple(Skipped(**each) for each in values["failed"]),
                "sizes": sizes,
                "path": tuple(PathPoint(**each) for each in values["path"]),
            }
        )

    def write(self, path: Path) -> None:
        """Write `report.json`; an old one stays until the new one is complete.

        Raises:
            ArtifactError: It cannot be written.
        """
        text = self.to_json()
        write_atomically(path, lambda part: part.write_text(text))


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: both become null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def build_report(
    model: nn.Module,
    plan: CompressionPlan,
    *,
    dense: Measured | None = None,
    accuracy: float | None = None,
    metric: str = "",
    criterion: str = "",
    heatmaps: str = "",
    artifacts: Sequence[Artifact] = (),
    failed: Sequence[Skipped] = (),
    relevance: Mapping[str, float] | None = None,
    positive_pruned: int = 0,
    halted: str = "",
    dense_sizes: DenseSizes | None = None,
    exported_epoch: float | None = None,
    int8_accuracy: float | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    versions: Mapping[str, str] | None = None,
    budget: str = "",
    path: Sequence[PathPoint] = (),
) -> Report:
    """Measure a compressed model.

    Args:
        model: Holds the compressed values.
        plan: What was decided.
        dense: The state before; its bytes are measured here where it is None.
        accuracy: Metric of the compressed model.
        relevance: Share of absolute relevance by parameter name.
        dense_sizes: Bytes of the state before.
        metric, criterion, heatmaps, artifacts, failed, positive_pruned, halted, exported_epoch, int8_accuracy,
            history, versions, budget, path: See `Report`.

    Raises:
        ArtifactError: The parameters are not what the plan says.
    """
    dense = dense or Measured(dense_bytes(model))
    size = packed_size(model, plan)
    parameters = dict(model.named_parameters())
    layers = tuple(
        LayerReport(
            name,
            keep.numel(),
            1 - float(keep.sum()) / keep.numel(),
            _rows(plan.allocation.bits[name]) if plan.allocation and name in plan.allocation.bits else {},
            size.layers.get(name, parameters[name].numel() * parameters[name].element_size()),
            (relevance or {}).get(name),
        )
        for name, keep in plan.mask.keep.items()
    )
    return Report(
        dense=dense,
        compressed=Measured(size.total, accuracy),
        reduction=1 - size.total / dense.bytes,
        sparsity=plan.mask.sparsity,
        average_bits=plan.allocation.average_bits if plan.allocation else None,
        metric=metric,
        criterion=criterion,
        heatmaps=heatmaps,
        artifacts=tuple(artifacts),
        layers=layers,
        skipped=plan.skipped,
        failed=tuple(failed),
        positive_pruned=positive_pruned,
        halted=halted,
        sizes=Sizes(
            dense_sizes,
            code_entropy(model, plan),
            {each.format: zstd_bytes(Path(each.path).read_bytes()) for each in artifacts},
        ),
        exported_epoch=exported_epoch,
        int8_accuracy=int8_accuracy,
        history=tuple(history),
        versions=dict(versions or {}),
        budget=budget,
        path=tuple(path),
    )


def _rows(bits: Tensor) -> dict[int, int]:
    return dict(sorted(Counter(bits.tolist()).items()))
