"""Before, after and files in, report out."""

from lightning_xai_compress.report.measure import (
    DenseSizes,
    dense_bytes,
    dense_sizes,
    estimated_bytes,
    evaluate,
    zstd_bytes,
)
from lightning_xai_compress.report.render import render
from lightning_xai_compress.report.report import LayerReport, Measured, Report, Sizes, build_report

__all__ = [
    "DenseSizes",
    "LayerReport",
    "Measured",
    "Report",
    "Sizes",
    "build_report",
    "dense_bytes",
    "dense_sizes",
    "estimated_bytes",
    "evaluate",
    "render",
    "zstd_bytes",
]
