"""A module and its plan without some channels: smaller tensors under the same names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask, ScoreMap
from lightning_xai_compress.sizes import restoring, sizes_fitted
from lightning_xai_compress.structure.channels import ChannelGroup, kept_entries

__all__ = ["Kept", "shrunk", "shrunk_plan", "shrunk_scores", "shrunk_weights"]

Kept = Mapping[str, Mapping[int, Tensor]]


@contextmanager
def shrunk(model: nn.Module, groups: Iterable[ChannelGroup], removed: Mapping[str, Tensor]) -> Iterator[Kept]:
    """Within it the module is without the removed channels; afterwards it is as it was.

    Args:
        model: Whose removed channels are masked, see `channel_mask`.
        groups, removed: As for `kept_entries`.

    Yields:
        What was kept of each tensor, for `shrunk_plan`.
    """
    state = dict([*model.named_parameters(), *model.named_buffers()])
    kept = kept_entries(groups, removed, {name: tensor.shape for name, tensor in state.items()})
    with restoring(model, always=True):
        with sizes_fitted(model) as changed:
            for prefix, module in model.named_modules():
                for name in [name for name in kept if name.rpartition(".")[0] == prefix]:
                    changed.add(module)
                    tensor, leaf = state[name], name.rpartition(".")[2]
                    if isinstance(tensor, nn.Parameter):
                        smaller = nn.Parameter(_select(tensor.detach(), kept[name]), requires_grad=tensor.requires_grad)
                        module._parameters[leaf] = smaller
                    else:
                        module._buffers[leaf] = _select(tensor, kept[name])
        yield kept


def shrunk_plan(plan: CompressionPlan, kept: Kept) -> CompressionPlan:
    """The plan of the smaller module.

    Args:
        plan: Of the masked one, with a bit width an output channel or a layer.
        kept: From `shrunk`.
    """
    keep = shrunk_weights(plan.mask.keep, kept)
    allocation, scales = plan.allocation, dict(plan.scales)
    if allocation is not None:
        rows = {name: kept.get(name, {}).get(0) for name in allocation.bits}
        bits = {name: _rows(each, rows[name]) for name, each in allocation.bits.items()}
        scales = {name: _rows(each, rows[name]) for name, each in scales.items()}
        sizes = {name: keep[name].numel() // max(1, len(each)) for name, each in bits.items()}
        allocation = BitAllocation(bits, sizes)
    return replace(plan, mask=Mask(keep), allocation=allocation, scales=scales)


def shrunk_weights(weights: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Tensors of the shapes of the weights, by their names, without what is not kept."""
    return {name: _select(weight, kept.get(name, {})) for name, weight in weights.items()}


def shrunk_scores(scores: ScoreMap, kept: Kept) -> ScoreMap:
    """The scores of what is kept."""
    parts = ("score", "relevance", "sensitivity", "rms", "absolute", "positive", "standard_error")
    found: dict[str, Any] = {part: shrunk_weights(getattr(scores, part), kept) for part in parts}
    return replace(scores, **found)


def _rows(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values.index_select(0, rows.to(values.device))


def _select(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    for axis, indices in axes.items():
        tensor = tensor.index_select(axis, indices.to(tensor.device))
    return tensor.contiguous()
