"""How far to prune at which point of the ramp."""

__all__ = ["cubic"]


def cubic(progress: float, *, final: float) -> float:
    """Rise fast, then settle: s(p) = final * (1 - (1 - p)^3) (Zhu & Gupta 2017, eq. 1).

    Args:
        progress: Share of the ramp done, in [0, 1].
        final: Sparsity at the end, in [0, 1).
    """
    return final * (1 - (1 - progress) ** 3)
