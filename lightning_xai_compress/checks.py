"""Checks of settings that several rooms share: types first, so that ranges can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

__all__ = ["check_names", "check_number"]


def check_number(name: str, value: Any, *, whole: bool = False) -> Any:
    """Turn any real number (numpy's too) into Python's own, whole numbers staying whole.

    Raises:
        ValueError: Not a finite number, or not a whole one where that is expected.
    """
    expected = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def check_names(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """Refuse a bare string, whose letters would pass for a list.

    Raises:
        ValueError: Not a list of strings.
    """
    if not isinstance(values, list | tuple) or any(not isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be a list of strings such as [{str(values)!r}], got {values!r}")
    return tuple(values)
