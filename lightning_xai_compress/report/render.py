"""The report as text."""

from __future__ import annotations

from lightning_xai_compress.report.report import PathPoint, Report
from lightning_xai_compress.tables import table

__all__ = ["render"]


def render(report: Report) -> str:
    """The report as text: totals, layers, files, and what was left alone."""
    before = "dense" if report.dense.at_epoch is None else f"dense, epoch {report.dense.at_epoch:g}"
    accuracies = report.dense.accuracy, report.compressed.accuracy
    measured = (report.metric, *map(_number, accuracies), _change(*accuracies))
    totals = table(
        ("", before, "compressed", "change"),
        [
            (
                "bytes, dense as fp32",
                f"{report.dense.bytes:,}",
                f"{report.compressed.bytes:,}",
                f"{-report.reduction:+.2%}",
            ),
            *([measured] if report.metric else []),
            ("sparsity", "", f"{report.sparsity:.2%}", ""),
            *([("scored by", "", report.criterion, "")] if report.criterion else []),
            ("average bits", "32", _bits(report.average_bits), ""),
        ],
    )
    layers = table(
        ("layer", "weights", "sparsity", "bits: rows", "bytes", "relevance"),
        [
            (
                layer.name,
                f"{layer.weights:,}",
                f"{layer.sparsity:.1%}",
                " ".join(f"{width}:{rows}" for width, rows in layer.bits.items()) or "32",
                f"{layer.bytes:,}",
                "unknown" if layer.relevance is None else f"{layer.relevance:.1%}",
            )
            for layer in report.layers
        ],
    )
    parts = [totals, layers]
    if report.artifacts:
        zstd = report.sizes.zstd if report.sizes else {}
        rows = [
            (each.path, f"{each.bytes:,}", _bytes(zstd.get(each.format)), f"{each.max_abs_diff:.2g}")
            for each in report.artifacts
        ]
        if report.sizes and report.sizes.dense:
            dense = report.sizes.dense
            rows.append(("(dense as fp32)", f"{dense.fp32:,}", f"{dense.fp32_zstd:,}", ""))
            rows.append(("(dense as int8)", f"{dense.int8:,}", f"{dense.int8_zstd:,}", ""))
        if report.sizes and report.sizes.code_entropy:
            rows.append(("(entropy of the codes alone)", f"{report.sizes.code_entropy:,.0f}", "", ""))
        parts.append(table(("file", "bytes", "under zstd", "max abs diff"), rows))
    if report.path:
        parts.append(table(("epoch", "bytes", "metric", "sparsity", "bits"), [_state(each) for each in report.path]))
    notes = [report.budget] if report.budget else []
    if report.exported_epoch is not None:
        notes.append(f"the files hold the best weights, those of epoch {report.exported_epoch:g}")
    if report.int8_accuracy is not None:
        notes.append(f"with 8-bit activations, in onnxruntime: {_number(report.int8_accuracy)}")
    notes += [f"not written: {each.name}: {each.reason}" for each in report.failed]
    notes += [f"left alone: {each.name}: {each.reason}" for each in report.skipped]
    if report.positive_pruned:
        notes.append(f"{report.positive_pruned:,} of the pruned weights had positive relevance")
    if report.halted:
        notes.append(f"pruning stopped early: {report.halted}")
    if report.heatmaps:
        notes.append(f"heat maps: {report.heatmaps}, beside the report")
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def _bytes(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _state(point: PathPoint) -> tuple[str, ...]:
    metric, bits = _number(point.metric), _bits(point.average_bits)
    return f"{point.epoch:.2f}", f"{point.bytes:,}", metric, f"{point.sparsity:.2%}", bits


def _bits(value: float | None) -> str:
    return "32" if value is None else f"{value:.2f}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{after - before:+.4f}"
