"""Weights and scores in, grids out: which bit width each channel gets, and the values on its grid."""

from lightning_xai_compress.quantization.activations import FakeActivations, fake_quantize, quantizable
from lightning_xai_compress.quantization.allocation import allocate_bits, check_bits
from lightning_xai_compress.quantization.grid import fit_scales, quantize, refit_scales
from lightning_xai_compress.quantization.inplace import mask_, requantize_

__all__ = [
    "FakeActivations",
    "allocate_bits",
    "check_bits",
    "fake_quantize",
    "fit_scales",
    "mask_",
    "quantizable",
    "quantize",
    "refit_scales",
    "requantize_",
]
