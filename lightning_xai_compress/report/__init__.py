"""Before, after and files in, report out."""

from lightning_xai_compress.report.measure import (
    DenseSizes,
    Mode,
    check_mode,
    dense_bytes,
    dense_sizes,
    estimated_bytes,
    evaluate,
    zstd_bytes,
)
from lightning_xai_compress.report.render import render
from lightning_xai_compress.report.report import LayerReport, Measured, PathPoint, Report, Sizes, build_report

__all__ = [
    "DenseSizes",
    "LayerReport",
    "Measured",
    "Mode",
    "PathPoint",
    "Report",
    "Sizes",
    "build_report",
    "check_mode",
    "dense_bytes",
    "dense_sizes",
    "estimated_bytes",
    "evaluate",
    "render",
    "zstd_bytes",
]
