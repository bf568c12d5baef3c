"""Where a model begins and ends: its first and its last layer, and the names that its weights go by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_xai_compress.relevance.calls import call_order

__all__ = ["Ends", "known_names"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Ends:
    """The first and the last compressible weight of a model.

    Args:
        first: Parameter name.
        last: The same; it is taken for the one that makes the outputs.
        axis: Axis of the last weight that counts the outputs.
    """

    first: str
    last: str
    axis: int = 0

    @classmethod
    def of(
        cls,
        module: nn.Module,
        weights: Mapping[str, nn.Parameter],
        batch: Callable[[], Any],
        *,
        agreed: Callable[[list[str]], list[str]] = lambda order: order,
    ) -> Ends:
        """By the order in which a batch meets the weights; where that cannot be seen, by registration.

        Args:
            module: Any.
            weights: Its compressible parameters by name.
            batch: Makes a batch; see `call_order`.
            agreed: Makes one order of those that several processes found.
        """
        registered = [name for name in known_names(module, weights) if name in weights]
        try:
            met = [name for name in call_order(module, batch()) if name in weights]
        except Exception:  # whatever the user's model raises: where scores need a pass, they say it better
            met = []
        met = agreed(met or registered)
        transposed = any(
            isinstance(layer, _TRANSPOSED) and layer._parameters.get("weight") is weights[met[-1]]
            for layer in module.modules()
        )
        return cls(met[0], met[-1], 1 if transposed else 0)

    def state(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def known_names(module: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Collection[str]]:
    """All names of the layers that hold each weight, and its own there; in the order in which modules are registered.

    A weight that several layers share stands where the last of them is.
    """
    names: dict[str, set[str]] = {}
    first = {id(weight): name for name, weight in weights.items()}
    for layer, each in module.named_modules(remove_duplicate=False):
        for key, parameter in each._parameters.items():
            if id(parameter) in first:
                known = names.pop(first[id(parameter)], set())
                names[first[id(parameter)]] = known | {layer, f"{layer}.{key}".lstrip(".")}
    return dict(names)
