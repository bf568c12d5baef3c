"""How far to prune at which point of the ramp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

__all__ = ["SCHEDULES", "Schedule", "cubic", "linear", "one_shot", "ramp", "stepwise"]

Schedule = Literal["one_shot", "linear", "cubic", "stepwise"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def one_shot(progress: float, *, final: float) -> float:
    """All at once: s(0) = 0, and `final` from the first step on.

    Args:
        progress: Share of the ramp done, in [0, 1].
        final: Sparsity at the end, in [0, 1).
    """
    return final if progress > 0 else 0.0


def linear(progress: float, *, final: float) -> float:
    """As much at every step: s(p) = final * p; arguments as for `one_shot`."""
    return final * progress


def cubic(progress: float, *, final: float) -> float:
    """Rise fast, then settle: s(p) = final * (1 - (1 - p)^3) (Zhu & Gupta 2017, eq. 1); arguments as for `one_shot`."""
    return final * (1 - (1 - progress) ** 3)


def stepwise(progress: float, *, final: float, levels: Sequence[float]) -> float:
    """By steps of one's own: after k of n steps the k-th level, in the proportion that makes the last one `final`.

    Args:
        progress: Share of the steps done, k / n, in [0, 1].
        final: Sparsity at the end, in [0, 1).
        levels: Sparsity after each step, rising, the last one above 0.
    """
    done = math.floor(progress * len(levels) + 1e-9)  # k / n * n may fall short of k
    return final * levels[done - 1] / levels[-1] if done else 0.0


def ramp(schedule: Schedule, levels: Sequence[float] = ()) -> Callable[..., float]:
    """The function from progress, and `final=` sparsity, to sparsity that goes by a name.

    Args:
        schedule: Its name.
        levels: For "stepwise".
    """
    if schedule == "stepwise":
        return partial(stepwise, levels=levels)
    return {"one_shot": one_shot, "linear": linear, "cubic": cubic}[schedule]
