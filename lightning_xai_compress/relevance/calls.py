"""The order in which a model uses its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_xai_compress.relevance.isolation import isolated, unwrapped

__all__ = ["call_order"]


def call_order(model: nn.Module, batch: Any) -> list[str]:
    """Names of all parameters in the order in which one batch meets them, a reused one at each of its uses.

    Functional calls and tied weights (under their first name) are seen; the model is left as it was.

    Args:
        model: Any module; its `relevance_step(batch, 0)`, where it has one, says what is run.
        batch: As `score` takes it.

    Raises:
        RelevanceError: A batch that is not understood.
    """
    model = unwrapped(model)
    with isolated(model, ()) as copy:
        copy.check_device(batch, 0)
        prepared, _ = copy.prepare(batch)
        uses = _Uses(copy.leaves)
        with uses:
            copy.run(prepared, 0, "margin")
    return uses.order


class _Uses(TorchFunctionMode):
    """Notes which of the leaves enter operations."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.order: list[str] = []
        self._leaves = leaves
        self._names = {id(leaf): name for name, leaf in leaves.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) and result else result
        if isinstance(first, Tensor) and getattr(func, "__name__", "") != "__get__":  # its shape or device is no use
            used = (self._names.get(id(each)) for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
            self.order += [name for name in used if name is not None]
        return result
