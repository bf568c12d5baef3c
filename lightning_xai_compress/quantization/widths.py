"""Which widths there are to choose from, and which ones the user has chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from lightning_xai_compress.checks import check_number
from lightning_xai_compress.plan import MAX_BITS, MIN_BITS

__all__ = ["check_bits", "check_widths", "fixed_widths"]


def check_bits(bits: Sequence[int], average_bits: float | None, fixed: Iterable[int] = ()) -> tuple[int, ...]:
    """Validate widths and budget; returns the widths sorted and once each.

    Args:
        bits: Widths to choose from.
        average_bits: Mean width; None where another budget decides.
        fixed: Widths of layers that have no choice.

    Raises:
        ValueError: A width outside 2..8, none at all, or a budget that the widths cannot meet.
    """
    if not isinstance(bits, list | tuple):
        raise ValueError(f"bits must be a list of widths such as [2, 4, 8], got {bits!r}")
    widths = tuple(sorted({check_number("each of bits", width, whole=True) for width in bits}))
    if not widths:
        raise ValueError("bits must name at least one width")
    if not MIN_BITS <= widths[0] <= widths[-1] <= MAX_BITS:
        raise ValueError(f"bits must be whole numbers in {MIN_BITS}..{MAX_BITS}, got {tuple(bits)}")
    if average_bits is not None:
        average_bits = check_number("average_bits", average_bits)
        fixed = tuple(fixed)
        every = (*widths, *fixed)
        if not min(every) <= average_bits <= max(every):
            also = f" and widths={sorted(set(fixed))}" if fixed else ""
            raise ValueError(
                f"average_bits must lie between the smallest and the largest of bits={widths}{also}, got {average_bits}"
            )
    return widths


def check_widths(widths: Mapping[str, int]) -> dict[str, int]:
    """Validate widths by pattern.

    Raises:
        ValueError: No mapping of patterns to whole numbers in 2..8.
    """
    if not isinstance(widths, Mapping) or any(not isinstance(pattern, str) for pattern in widths):
        raise ValueError(f"widths must map patterns to bits such as {{'head*': 8}}, got {widths!r}")
    checked = {pattern: check_number(f"width of {pattern!r}", width, whole=True) for pattern, width in widths.items()}
    wrong = {pattern: width for pattern, width in checked.items() if not MIN_BITS <= width <= MAX_BITS}
    if wrong:
        raise ValueError(f"widths must be whole numbers in {MIN_BITS}..{MAX_BITS}, got {wrong}")
    return checked


def fixed_widths(names: Iterable[str], widths: Mapping[str, int]) -> dict[str, int]:
    """Which weights have their width fixed.

    Args:
        names: Parameter names of weights that are quantized.
        widths: Shell-style patterns, matched against layer and parameter names, and the width of what they match; the
            first match wins.

    Raises:
        ValueError: As `check_widths`; a pattern that matches nothing.
    """
    widths, names = check_widths(widths), sorted(names)
    matched: set[str] = set()
    fixed: dict[str, int] = {}
    for name in names:
        hits = [each for each in widths if fnmatchcase(name, each) or fnmatchcase(name.rpartition(".")[0], each)]
        matched.update(hits)
        if hits:
            fixed[name] = widths[hits[0]]
    unmatched = [pattern for pattern in widths if pattern not in matched]
    if unmatched:
        raise ValueError(f"widths={unmatched} matches no weight that is quantized; those are: {', '.join(names[:8])}")
    return fixed
