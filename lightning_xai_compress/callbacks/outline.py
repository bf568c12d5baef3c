"""What a fit will do, as a table, before its first batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_xai_compress.callbacks.clock import Clock
from lightning_xai_compress.callbacks.stage import Stage
from lightning_xai_compress.report import dense_bytes, estimated_bytes
from lightning_xai_compress.tables import table

__all__ = ["schedule_table"]


def schedule_table(
    module: nn.Module, clock: Clock, stages: Sequence[Stage], weights: Mapping[str, nn.Parameter]
) -> str:
    """The plan as a small table; sizes are estimates."""
    points = {clock.start: "warm-up"}
    for stage in stages:
        points |= dict(_thinned(stage.phases()))
    dense = dense_bytes(module)
    count = sum(parameter.numel() for parameter in weights.values())
    rows: list[tuple[str, ...]] = []
    for batch, phase in sorted(points.items()):
        plans = [stage.planned(batch) for stage in stages]
        sparsity = next((plan.sparsity for plan in plans if plan.sparsity is not None), 0.0)
        bits = next((plan.bits for plan in plans if plan.bits is not None), None)
        guess = "~" if any(plan.open for plan in plans) else ""
        budget = next((plan.budget for plan in plans if plan.budget), "")
        size = estimated_bytes(dense, count, sparsity, bits)
        rows.append(
            (
                clock.label(batch),
                phase,
                f"{guess}{sparsity:.1%}",
                "32" if bits is None else f"{bits:g}",
                f"~{size / 1000:,.1f} kB ({size / dense:.1%})",
                budget,
            )
        )
    rows.append((clock.label(clock.batches), "end", "", "", "", ""))
    if not any(row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    return table(("from epoch", "phase", "sparsity", "bits", "estimated size", "budget")[: len(rows[0])], rows)


def _thinned(points: list[tuple[int, str]], most: int = 6) -> list[tuple[int, str]]:
    """At most so many of the points, first and last among them."""
    if len(points) <= most:
        return points
    return [points[index * (len(points) - 1) // (most - 1)] for index in range(most)]
