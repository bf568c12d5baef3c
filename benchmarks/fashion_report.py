"""From rows of the Fashion-MNIST benchmark to docs/benchmark.md and its plots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fashion_checks import AT_LEAST, LIMITS, NOISE, Checks, Comparison, Row, Table, met
from fashion_grid import MODELS, Recipe
from fashion_plot import TITLES, plot
from fashion_tasks import Budget, Method, Run

__all__ = ["checks_table", "page", "write"]

HEADER = """<!-- Written by `make benchmark` from benchmarks/results/fashion_mnist.json; changes made here are lost. -->

# Fashion-MNIST at equal bytes

Test accuracy in percent of the file as read back, mean over seeds ± standard deviation. Bytes are those of real
safetensors files, the dense one in fp32. "Dense" is the dense checkpoint that all start from, trained on for as many
epochs without compression. A difference counts as ahead or behind when it exceeds both 0.3 points and two standard
errors of the paired differences.
"""


def write(
    folder: Path,
    *,
    table: Table,
    controls: Mapping[str, Mapping[int, float]],
    checks: Checks,
    recipe: Recipe,
    environments: Sequence[Mapping[str, Any]],
    code: Sequence[str] = (),
    remarks: Sequence[str] = (),
) -> Path:
    """Write `benchmark.md` and `plots/*.svg` below a folder.

    Args:
        folder: The docs.
        table: What ran.
        controls: Test accuracy of the dense models, by model and seed.
        checks: Figures of that table.
        recipe: What was the same for all.
        environments: In which it ran.
        code: Versions of the package that ran.
        remarks: What else a reader must know, a line each: what failed, what did not run.
    """
    plots = {}
    for model in [model for model in MODELS if any(case.model == model for case in table)]:
        plots[model] = folder / "plots" / f"fashion_{model}.svg"
        plot(model, table, controls.get(model, {}), plots[model])
    text = page(table, controls, checks, recipe, environments, code, remarks, [*plots])
    path = folder / "benchmark.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def page(
    table: Table,
    controls: Mapping[str, Mapping[int, float]],
    checks: Checks,
    recipe: Recipe,
    environments: Sequence[Mapping[str, Any]],
    code: Sequence[str],
    remarks: Sequence[str],
    plotted: Iterable[str],
) -> str:
    """The page; see `write`."""
    parts = [HEADER, *_what_ran(recipe, environments, code)]
    for model in MODELS:
        cases = [case for case in table if case.model == model and case.budget.kind == "size"]
        if cases:
            parts += [f"## {TITLES[model]}\n"]
            parts += [_accuracies(cases, table, controls.get(model, {}), lambda row: row.test)]
            parts += [f"![accuracy over bytes](plots/fashion_{model}.svg)\n"] if model in plotted else []
            parts += ["What the files are: reduction, zeros, mean bits.\n", _files(cases, table)]
            parts += ["On the validation images, by which choices were made.\n"]
            parts += [_accuracies(cases, table, {}, lambda row: row.val)]
    others = [case for case in table if case.budget.kind != "size"]
    if others:
        parts += ["## Other budgets\n", _others(others, table)]
    parts += ["## Checks\n", checks_table(checks), "## Behind, or not reached\n", _shortcomings(checks, remarks)]
    return "\n".join(parts)


def checks_table(checks: Checks) -> str:
    """Figures beside their limits."""
    rows = []
    for name, limit in LIMITS.items():
        value = checks.values.get(name)
        ratio = checks.byte_ratios.get(name)
        verdict = "no data" if value is None else "yes" if met(name, value) else "**no**"
        rows.append([
            name,
            "" if value is None else f"{value:.3f}",
            f"{'>=' if name in AT_LEAST else '<='} {limit:g}",
            verdict,
            str(checks.seeds.get(name, "")),
            "" if ratio is None else f"{ratio:.3f}",
        ])  # fmt: skip
    return _markdown(["check", "measured", "limit", "reached", "seeds", "bytes, default / other"], rows)


def _what_ran(recipe: Recipe, environments: Sequence[Mapping[str, Any]], code: Sequence[str]) -> list[str]:
    lines = [
        f"{recipe.dense_epochs} dense epochs, then {recipe.epochs} of compression, pruning in the first "
        f"{recipe.pruning_end:.0%} of them; batches of {recipe.batch_size}, SGD with a one-cycle schedule to "
        f"{recipe.learning_rate:g}, {recipe.precision}; weight decay of these epochs {recipe.weight_decay:g}, "
        f"{_teacher(recipe)}; {recipe.train_samples:,} training, {recipe.val_samples:,} "
        f"validation and {recipe.test_samples:,} test images.\n"
    ]
    for each in environments:
        versions = ", ".join(f"{name} {each['packages'][name]}" for name in ("torch", "lightning", "torchao"))
        lines.append(f"{versions}; Python {each['python']}; {each['processor']}, one thread a process.\n")
    if code:
        lines.append(
            f"Code of the package, as commits (with a plus where files differed) and digests of its sources: "
            f"{', '.join(code)}.\n"
        )
    return lines


def _teacher(recipe: Recipe) -> str:
    if recipe.distillation is None:
        return "no teacher"
    return f"the dense checkpoint as a teacher with weight {recipe.distillation:g}, for every method alike"


def _accuracies(cases: Sequence[Run], table: Table, control: Mapping[int, float], value: Callable[[Row], float]) -> str:
    budgets, methods = _axes(cases)
    best = {budget: max(_mean(table, case, value) for case in cases if case.budget == budget) for budget in budgets}
    rows = []
    if control:
        rows.append(["dense", *[_stated([*control.values()])] * len(budgets), str(len(control))])
    for method in methods:
        cells, seeds = [], set()
        for budget in budgets:
            case = Run(cases[0].model, method, budget, -1)
            if case not in table:
                cells.append("")
                continue
            values = [value(row) for row in table[case].values()]
            text = _stated(values)
            cells.append(f"**{text}**" if statistics.mean(values) == best[budget] else text)
            seeds.add(len(values))
        rows.append([method.label, *cells, _range(seeds)])
    return _markdown(["method", *[budget.label for budget in budgets], "seeds"], rows)


def _files(cases: Sequence[Run], table: Table) -> str:
    budgets, methods = _axes(cases)
    rows = []
    for method in methods:
        found = [Run(cases[0].model, method, budget, -1) for budget in budgets]
        rows.append([method.label, *[_described(table, case) if case in table else "" for case in found]])
    return _markdown(["method", *[budget.label for budget in budgets]], rows)


def _others(cases: Sequence[Run], table: Table) -> str:
    rows = []
    for case in cases:
        test = [row.test for row in table[case].values()]
        drop = [row.drop for row in table[case].values()]
        name = f"{case.method.name}, {case.budget.label}"
        rows.append([case.model, name, _stated(test), _stated(drop), _described(table, case), str(len(test))])
    return _markdown(["model", "method", "accuracy", "points lost", "reduction, zeros, mean bits", "seeds"], rows)


def _shortcomings(checks: Checks, remarks: Sequence[str]) -> str:
    lines = [
        f"{name}: {value:.3f}, to be {'at least' if name in AT_LEAST else 'at most'} {LIMITS[name]:g}"
        for name, value in checks.values.items()
        if not met(name, value)
    ]
    lines += [
        f"{name}: not given, the files differ by more than 2 % ({ratio:.3f})"
        for name, ratio in checks.byte_ratios.items()
        if name not in checks.values
    ]
    lines += [f"behind: {_compared(each)}" for each in sorted(checks.behind, key=lambda each: each.gain)]
    worst = checks.largest_shortfall
    if worst is not None and worst.gain < 0:
        lines.append(f"largest shortfall, noise or not: {_compared(worst)}")
    lines += [
        f"unequal files, ahead of the default: {_compared(each)}"
        for each in checks.comparisons
        if each.gain < -NOISE and not each.equal_bytes and each not in checks.behind
    ]
    if checks.above_target:
        lines.append(f"larger than asked for: {', '.join(checks.above_target)}")
    return "".join(f"- {line}\n" for line in [*lines, *remarks]) or "Nothing.\n"


def _compared(each: Comparison) -> str:
    noise = f"standard error {each.error:.2f}, " if each.seeds > 1 else ""
    return f"{each.label}, {each.gain:+.2f} points ({noise}{each.seeds} seed{'s' if each.seeds > 1 else ''})"


def _described(table: Table, case: Run) -> str:
    bits = [row.average_bits for row in table[case].values() if row.average_bits is not None]
    mean_bits = f"{statistics.mean(bits):.2f}" if bits else "float"
    reduction, zeros = (_mean(table, case, each) for each in (lambda row: row.reduction, lambda row: row.sparsity))
    return f"{100 * reduction:.2f} %, {100 * zeros:.1f} %, {mean_bits}"


def _axes(cases: Sequence[Run]) -> tuple[list[Budget], list[Method]]:
    budgets = sorted({case.budget for case in cases}, key=lambda budget: budget.value)
    return budgets, list(dict.fromkeys(case.method for case in cases))


def _mean(table: Table, case: Run, value: Callable[[Row], float]) -> float:
    return statistics.mean(value(row) for row in table[case].values())


def _stated(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _range(numbers: set[int]) -> str:
    return f"{min(numbers)}" if len(numbers) == 1 else f"{min(numbers)}-{max(numbers)}"


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
