"""Settings of a selection: how weights compare, and which ones must stay."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from lightning_xai_compress.checks import check_names, check_number

__all__ = ["Choice", "Normalization", "Scope", "matching"]

Scope = Literal["global", "layer"]
Normalization = Literal["lamp"]


@dataclass(frozen=True)
class Choice:
    """How weights compare, and which ones must stay whatever the sparsity.

    Args:
        scope: "global": one ranking over all layers. "layer": the same sparsity in every layer, as far as rule and
            floors allow; what one layer cannot give, the others do.
        floor: Share of each layer's weights that stays at least, in [0, 1); one weight always does.
        confidence: With rules that go by the sign: one-sided, in [0.5, 1): only weights whose relevance is that surely
            <= 0 count as such. None: by the mean alone.
        normalization: "lamp": compare score^2 over the sum of all score^2 of the layer that are not smaller (Lee et
            al. 2021, eq. 1). None: the scores as they are.
        protect: Shell-style patterns of layers or parameters that are never pruned; they count in the total.
        outputs: Weights that make the model's outputs, and the axis of each that counts them (0, but 1 for a transposed
            convolution): every output keeps its best weight.

    Raises:
        ValueError: Anything else.
    """

    scope: Scope = "global"
    floor: float = 0.0
    confidence: float | None = None
    normalization: Normalization | None = None
    protect: Sequence[str] = ()
    outputs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer', got {self.scope!r}")
        if not 0 <= check_number("floor", self.floor) < 1:
            raise ValueError(f"floor, a share of each layer's weights, must lie in [0, 1), got {self.floor}")
        if self.confidence is not None and not 0.5 <= check_number("confidence", self.confidence) < 1:
            raise ValueError(f"confidence must be None or lie in [0.5, 1), got {self.confidence}")
        if self.normalization not in (None, "lamp"):
            raise ValueError(f"normalization must be None or 'lamp', got {self.normalization!r}")
        check_names("protect", self.protect)


def matching(names: Mapping[str, Collection[str]], patterns: Sequence[str]) -> set[str]:
    """Parameters that go by a name which one of the patterns matches.

    Args:
        names: Of the layers, and its own, of each parameter.
        patterns: Shell-style, or names.

    Raises:
        ValueError: A pattern that matches nothing.
    """

    def hit(pattern: str) -> set[str]:
        return {
            parameter
            for parameter, known in names.items()
            if parameter == pattern or any(fnmatchcase(name, pattern) for name in known)
        }

    found = {pattern: hit(pattern) for pattern in patterns}
    if unmatched := [pattern for pattern, hits in found.items() if not hits]:
        raise ValueError(
            f"protect={unmatched} matches no layer that is compressed; names look like: {', '.join(sorted(names)[:8])}"
        )
    return set().union(*found.values())
