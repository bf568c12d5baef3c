"""Weights and scores in, grids out: which bit width each channel gets, and the values on its grid."""

from lightning_xai_compress.quantization.allocation import allocate_bits, check_bits
from lightning_xai_compress.quantization.grid import fit_scales, quantize, refit_scales

__all__ = ["allocate_bits", "check_bits", "fit_scales", "quantize", "refit_scales"]
