"""Weights and scores in, grids out: which bit width each channel gets, and the values on its grid."""

from lightning_xai_compress.quantization.activations import FakeActivations, fake_quantize, quantizable
from lightning_xai_compress.quantization.allocation import (
    Allocated,
    BitsPer,
    Price,
    Strategy,
    WidthCosts,
    allocate_bits,
    measure_widths,
    row_count,
)
from lightning_xai_compress.quantization.grid import fit_scales, quantize, refit_scales
from lightning_xai_compress.quantization.inplace import mask_, requantize_
from lightning_xai_compress.quantization.widths import check_bits, check_widths, fixed_widths

__all__ = [
    "Allocated",
    "BitsPer",
    "FakeActivations",
    "Price",
    "Strategy",
    "WidthCosts",
    "allocate_bits",
    "check_bits",
    "check_widths",
    "fake_quantize",
    "fit_scales",
    "fixed_widths",
    "mask_",
    "measure_widths",
    "quantizable",
    "quantize",
    "refit_scales",
    "requantize_",
    "row_count",
]
