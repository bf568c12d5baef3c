"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_xai_compress.report.report import Report

__all__ = ["render", "table"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in line: the first to the left, the others to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def join(line: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([join(lines[0]), "  ".join("-" * width for width in widths), *map(join, lines[1:])])


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
                f"-{report.reduction:.2%}",
            ),
            *([measured] if report.metric else []),
            ("sparsity", "", f"{report.sparsity:.2%}", ""),
            *([("scored by", "", report.criterion, "")] if report.criterion else []),
            ("average bits", "32", "32" if report.average_bits is None else f"{report.average_bits:.2f}", ""),
        ],
    )
    layers = table(
        ("layer", "weights", "sparsity", "bits: channels", "bytes", "relevance"),
        [
            (
                layer.name,
                f"{layer.weights:,}",
                f"{layer.sparsity:.1%}",
                " ".join(f"{width}:{channels}" for width, channels in layer.bits.items()) or "32",
                f"{layer.bytes:,}",
                "unknown" if layer.relevance is None else f"{layer.relevance:.1%}",
            )
            for layer in report.layers
        ],
    )
    parts = [totals, layers]
    if report.artifacts:
        parts.append(
            table(
                ("file", "bytes", "max abs diff"),
                [(each.path, f"{each.bytes:,}", f"{each.max_abs_diff:.2g}") for each in report.artifacts],
            )
        )
    notes = [f"not written: {each.name}: {each.reason}" for each in report.failed]
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


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{after - before:+.4f}"
