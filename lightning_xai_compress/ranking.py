"""How scores of different layers are made comparable; for criteria as well as for pruning."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lamp"]


def lamp(score: Tensor) -> Tensor:
    """Square of each score over the sum of all squares of its layer that are not smaller (Lee et al. 2021, eq. 1).

    The order within a layer stays, the largest becomes 1, and the scale of the layer does not matter.

    Args:
        score: Of one layer, or its weights: any shape and sign. Unknown ones (NaN) stay so and count as zero.

    Returns:
        Values in [0, 1], same shape; of equal ones, the earlier are smaller.
    """
    known = score.flatten().nan_to_num(nan=0.0).abs()
    # squares of small scores would be zero, and those of large ones infinite
    squares = (known / known.amax().clamp_min(torch.finfo(known.dtype).tiny)).square() if known.numel() else known
    ascending, order = squares.sort(stable=True)
    not_smaller = ascending.flip(0).cumsum(0).flip(0)
    result = torch.empty_like(squares)
    result[order] = ascending / not_smaller.clamp_min(torch.finfo(squares.dtype).tiny)
    return torch.where(score.isfinite(), result.view_as(score), score.abs())  # whoever scores refuses infinite ones
