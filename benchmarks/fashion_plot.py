"""Accuracy over bytes: the plots of the Fashion-MNIST benchmark, the same file for the same rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fashion_checks import Row, Table
from fashion_tasks import Method, Run

__all__ = ["TITLES", "plot"]

TITLES = {
    "cnn": "CNN with BatchNorm, 0.34 M weights",
    "resnet": "ResNet-20, 0.27 M weights",
    "lenet": "LeNet-300-100, 0.27 M weights",
}
STYLES = {
    "default": ("tab:red", "o"),
    "magnitude": ("tab:blue", "s"),
    "lamp": ("tab:green", "^"),
    "wanda": ("tab:purple", "v"),
    "fisher": ("tab:orange", "D"),
    "taylor": ("tab:brown", "P"),
    "random": ("tab:gray", "X"),
    "nonpositive": ("tab:cyan", "*"),
    "literal": ("black", "x"),
}
LINES_A_PANEL = 8
SVG: Any = {"svg.hashsalt": "fashion-mnist", "svg.fonttype": "none", "font.size": 9.0}
KB = 1000


def plot(model: str, table: Table, control: Mapping[int, float], path: Path) -> None:
    """Accuracy over bytes, a line a method; two panels where there are many."""
    cases = [case for case in table if case.model == model]
    lines = list(dict.fromkeys(case.method for case in cases if case.budget.kind == "size"))
    panels: list[list[Method]] = [lines]
    if len(lines) > LINES_A_PANEL:
        panels = [[each for each in lines if each.widths == widths] for widths in ("mixed", "uniform")]
    points = [case for case in cases if case.budget.kind != "size"]
    with mpl.rc_context(SVG):
        figure = Figure(figsize=(5.5 + 4.5 * (len(panels) - 1), 4.2), layout="constrained")
        for axes, methods in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
            for method in methods:
                _line(axes, [case for case in cases if case.method == method and case.budget.kind == "size"], table)
            # other budgets have mixed bits
            for method in dict.fromkeys(case.method for case in points if axes is figure.axes[0]):
                for kind in dict.fromkeys(case.budget.kind for case in points if case.method == method):
                    _line(axes, [case for case in points if case.method == method and case.budget.kind == kind], table)
            if control:
                axes.axhline(statistics.mean(control.values()), color="black", linewidth=0.8, label="dense")
            axes.set(xscale="log", xlabel="bytes in kB (log scale)")
            _ticks(axes, cases, table)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, loc="lower right")
        left = figure.axes[0]
        left.set(ylabel="test accuracy in %", ylim=_frame(cases, table, control))
        figure.suptitle(f"{TITLES[model]}\npoints below the frame are in the table", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _line(axes: Axes, cases: Sequence[Run], table: Table) -> None:
    """One method and kind of budget; single points are not joined unless sizes were asked for."""
    first = cases[0]
    color, marker = STYLES[first.method.name]
    joined = first.budget.kind == "size"
    style = "-" if first.method.widths == "mixed" else "--"
    label = first.method.label if joined else f"{first.method.name}, {first.budget.kind.replace('_', ' ')}"
    drawn = sorted((_mean(table, case, lambda row: row.bytes) / KB, case.budget.value, case) for case in cases)
    stated = [_mean_and_spread(table, case, lambda row: row.test) for _, _, case in drawn]
    axes.errorbar(
        [size for size, _, _ in drawn],
        [mean for mean, _ in stated],
        [spread or 0.0 for _, spread in stated],
        color=color,
        marker=marker if joined or first.method.name != "default" else "h",
        markersize=4 if joined else 7,
        linestyle=style if joined else "none",
        capsize=2,
        label=label,
    )


def _ticks(axes: Axes, cases: Sequence[Run], table: Table) -> None:
    """A tick for each size asked for, with its reduction."""
    targets = {
        row.target / KB: case.budget.label for case in cases for row in table[case].values() if row.target is not None
    }
    axes.set_xticks([*targets], [f"{size:.0f}\n{label}" for size, label in targets.items()])
    axes.set_xticks([], minor=True)


def _frame(cases: Sequence[Run], table: Table, control: Mapping[int, float]) -> tuple[float, float] | None:
    """What shows the default with room below; nothing else decides, least of all a random choice."""
    sizes = [case for case in cases if case.budget.kind == "size"]
    means = [_mean(table, case, lambda row: row.test) for case in sizes if case.method.name == "default"]
    if not means:
        return None
    top = max([*control.values(), *means])
    return min(means) - max(1.0, 1.5 * (top - min(means))), top + 0.5


def _mean(table: Table, case: Run, value: Callable[[Row], float]) -> float:
    return statistics.mean(value(row) for row in table[case].values())


def _mean_and_spread(table: Table, case: Run, value: Callable[[Row], float]) -> tuple[float, float | None]:
    values = [value(row) for row in table[case].values()]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
