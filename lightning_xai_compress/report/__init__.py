"""Before, after and files in, report out."""

from lightning_xai_compress.report.measure import dense_bytes, estimated_bytes, evaluate
from lightning_xai_compress.report.render import render, table
from lightning_xai_compress.report.report import LayerReport, Measured, Report, build_report

__all__ = [
    "LayerReport",
    "Measured",
    "Report",
    "build_report",
    "dense_bytes",
    "estimated_bytes",
    "evaluate",
    "render",
    "table",
]
