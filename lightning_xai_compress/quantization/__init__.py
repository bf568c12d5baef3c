"""Weights and scores in, grids out: which bit width each channel gets, and the values on its grid."""

from lightning_xai_compress.quantization.activations import FakeActivations, fake_quantize, quantizable
from lightning_xai_compress.quantization.allocation import (
    Allocated,
    BitsPer,
    Price,
    Quantizer,
    Strategy,
    WidthCosts,
    allocate_bits,
    block_count,
    measure_widths,
    row_count,
)
from lightning_xai_compress.quantization.codebook import fit_codebook, nearest_codes, refit_codebook
from lightning_xai_compress.quantization.grid import fit_scales, quantize, refit_scales
from lightning_xai_compress.quantization.inplace import mask_, requantize_
from lightning_xai_compress.quantization.widths import check_bits, check_widths, fixed_widths

__all__ = [
    "Allocated",
    "BitsPer",
    "FakeActivations",
    "Price",
    "Quantizer",
    "Strategy",
    "WidthCosts",
    "allocate_bits",
    "block_count",
    "check_bits",
    "check_widths",
    "fake_quantize",
    "fit_codebook",
    "fit_scales",
    "fixed_widths",
    "mask_",
    "measure_widths",
    "nearest_codes",
    "quantizable",
    "quantize",
    "refit_codebook",
    "refit_scales",
    "requantize_",
    "row_count",
]
