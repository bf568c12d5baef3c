"""Codes of a packed file as torchao integer tensors: torchao is imported only when they are asked for."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

__all__ = ["integer_tensor", "torchao_class"]


def torchao_class() -> Any:
    """Give the tensor class that holds a byte a weight.

    Raises:
        ImportError: torchao is not installed, or has no such class.
    """
    pytree = logging.getLogger("torch.utils._pytree")
    was_disabled, pytree.disabled = pytree.disabled, True  # torchao 0.18 triggers a deprecation note of torch's own
    try:
        from torchao.quantization import IntxUnpackedToInt8Tensor
    except ImportError as error:
        raise ImportError(
            "integers=True expected torchao with its IntxUnpackedToInt8Tensor, got none: pip install 'torchao>=0.18', "
            "or leave integers out to load floats"
        ) from error
    finally:
        pytree.disabled = was_disabled
    return IntxUnpackedToInt8Tensor


def integer_tensor(codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Put codes into a torchao tensor.

    Args:
        codes: int8 of shape [channels, inputs].
        scales: Step of each row, float32 of shape [rows], of which each channel has one or several: float32 also where
            the weight has half the bytes, since torchao multiplies before it rounds.
        bits: Width of the widest row, 2..8.
        dtype: Of the weight: float32, float16 or bfloat16.
    """
    groups = len(scales) // len(codes)
    tensor: Tensor = torchao_class()(
        codes,
        scales.reshape(-1, groups),
        torch.zeros(len(codes), groups, dtype=torch.int8),
        getattr(torch, f"int{bits}"),
        (1, codes.shape[1] // groups),
        dtype,
        None,
    )
    return tensor
