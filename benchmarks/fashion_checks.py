"""From rows of the Fashion-MNIST benchmark to the figures that have limits, and who is ahead of whom."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fashion_grid import DEFAULT, LAMP_MIXED, MAGNITUDE_UNIFORM
from fashion_tasks import Budget, Method, Run, RunResult

__all__ = [
    "AT_LEAST",
    "EQUAL_BYTES",
    "LIMITS",
    "NOISE",
    "Checks",
    "Comparison",
    "Row",
    "Table",
    "checks_of",
    "compare",
    "met",
    "table_of",
]

# points, but for shares: target_size_error and max_drop_0_5_reduction
LIMITS = {
    "drop_at_97_5": 0.3,
    "drop_at_98_5": 0.6,
    "drop_at_99": 1.2,
    "gain_over_magnitude_uniform4_at_97_5": 0.5,
    "gain_over_magnitude_uniform4_at_98_5": 1.2,
    "gain_over_magnitude_uniform4_at_99": 2.5,
    "gain_over_lamp_mixed_at_98_5": 0.3,
    "gain_over_lamp_mixed_at_99": 0.6,
    "worst_gap_to_best_criterion": 0.0,
    "nonpositive_drop_at_50": 0.3,
    "nonpositive_drop_at_90": 0.6,
    "target_size_error": 0.02,
    "max_drop_0_5_test_drop": 0.7,
    "max_drop_0_5_reduction": 0.975,
}
AT_LEAST = {name for name in LIMITS if name.startswith(("gain", "worst_gap")) or name.endswith("reduction")}
NOISE = 0.3  # points that a difference has to exceed
EQUAL_BYTES = 1.02  # ratio of two files that count as equal
NOT_LESS = 1e-9  # 0.3 points are not 0.3 in binary


@dataclass(frozen=True, kw_only=True)
class Row(RunResult):
    """What a run came to, beside the test accuracy of its control in percent."""

    run: Run
    control_test: float

    @property
    def drop(self) -> float:
        """Points lost against the dense model trained as long."""
        return self.control_test - self.test

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Row:
        """From an entry of the results."""
        return cls(run=Run.read(values), **{name: values[name] for name in cls.__dataclass_fields__ if name != "run"})


Table = Mapping[Run, Mapping[int, Row]]  # case -> seed -> row


def table_of(rows: Iterable[Row]) -> Table:
    """Rows by case and seed."""
    table: dict[Run, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: row.run.seed):
        table.setdefault(row.run.case, {})[row.run.seed] = row
    return table


@dataclass(frozen=True)
class Comparison:
    """Of two cases, over the seeds that both have.

    Args:
        ours, theirs: The cases.
        gain: Mean of the paired differences in test accuracy, ours - theirs, in points.
        error: Standard error of that mean; infinite for one seed.
        seeds: Their number.
        byte_ratios: Bytes ours / theirs, a seed each.
    """

    ours: Run
    theirs: Run
    gain: float
    error: float
    seeds: int
    byte_ratios: tuple[float, ...]

    @property
    def counts(self) -> bool:
        """Whether the difference is more than noise."""
        return abs(self.gain) > max(NOISE, 2 * self.error)

    @property
    def equal_bytes(self) -> bool:
        """Whether all pairs of files are of one size."""
        return all(1 / EQUAL_BYTES <= ratio <= EQUAL_BYTES for ratio in self.byte_ratios)

    @property
    def worst_byte_ratio(self) -> float:
        """Of the pair that differs most."""
        return max(self.byte_ratios, key=lambda ratio: abs(math.log(ratio)))

    @property
    def label(self) -> str:
        """Who against whom."""
        budget = self.ours.budget.label
        return f"{self.ours.model} at {budget}: {self.ours.method.label} against {self.theirs.method.label}"


def compare(table: Table, ours: Run, theirs: Run) -> Comparison | None:
    """Two cases, where there is a seed that both have."""
    mine, other = table.get(ours.case, {}), table.get(theirs.case, {})
    seeds = [seed for seed in mine if seed in other]
    if not seeds:
        return None
    gains = [mine[seed].test - other[seed].test for seed in seeds]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    ratios = tuple(mine[seed].bytes / other[seed].bytes for seed in seeds)
    return Comparison(ours.case, theirs.case, statistics.mean(gains), error, len(seeds), ratios)


@dataclass
class Checks:
    """Figures with limits, as far as there is data for them.

    Args:
        values: Name -> figure.
        seeds: Name -> number of seeds it is the mean of; the smallest of several comparisons.
        byte_ratios: Name -> bytes of the default over the other's, of the pair that differs most.
        comparisons: All of the default against other criteria.
        largest_shortfall: The worst of those, noise or not; None where there are none.
        target_errors: Model -> worst relative deviation from the size asked for.
        above_target: Keys of files larger than asked for.
    """

    values: dict[str, float] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    byte_ratios: dict[str, float] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    largest_shortfall: Comparison | None = None
    target_errors: dict[str, float] = field(default_factory=dict)
    above_target: list[str] = field(default_factory=list)

    @property
    def behind(self) -> list[Comparison]:
        """Where another criterion is ahead of the default by more than noise, with a file that is not larger."""
        return [each for each in self.comparisons if each.gain < 0 and each.counts and not _larger_file(each)]

    def add(self, name: str, value: float, seeds: int) -> None:
        """Put one figure."""
        self.values[name], self.seeds[name] = value, seeds

    def to_dict(self) -> dict[str, Any]:
        """What results hold, plain types."""
        worst = self.largest_shortfall
        return {
            "checks": {name: self.values[name] for name in LIMITS if name in self.values},
            "seeds_of_checks": {name: self.seeds[name] for name in LIMITS if name in self.seeds},
            "byte_ratios_of_checks": self.byte_ratios,
            "largest_shortfall": None if worst is None else {"points": min(worst.gain, 0.0), "of": worst.label},
            "behind": {each.label: each.gain for each in self.behind},
            "target_size_errors": self.target_errors,
            "above_target_size": self.above_target,
        }


def met(name: str, value: float) -> bool:
    """Whether a figure keeps its limit."""
    limit = LIMITS[name]
    return value >= limit - NOT_LESS if name in AT_LEAST else value <= limit + NOT_LESS


def checks_of(table: Table) -> Checks:
    """All figures that there is data for."""
    checks = Checks()
    for reduction in (97.5, 98.5, 99.0):
        _drop(checks, table, f"drop_at_{_name(reduction)}", Run("cnn", DEFAULT, Budget("size", reduction), -1))
    for reduction in (97.5, 98.5, 99.0):
        name = f"gain_over_magnitude_uniform4_at_{_name(reduction)}"
        _gain(checks, table, name, MAGNITUDE_UNIFORM, reduction)
    for reduction in (98.5, 99.0):
        _gain(checks, table, f"gain_over_lamp_mixed_at_{_name(reduction)}", LAMP_MIXED, reduction)
    _gaps(checks, table)
    for share in (0.5, 0.9):
        case = Run("cnn", Method("nonpositive"), Budget("sparsity", share), -1)
        _drop(checks, table, f"nonpositive_drop_at_{100 * share:.0f}", case)
    _targets(checks, table)
    limited = Run("cnn", DEFAULT, Budget("max_drop", 0.5), -1)
    _drop(checks, table, "max_drop_0_5_test_drop", limited)
    if rows := [*table.get(limited, {}).values()]:
        checks.add("max_drop_0_5_reduction", statistics.mean(row.reduction for row in rows), len(rows))
    return checks


def _drop(checks: Checks, table: Table, name: str, case: Run) -> None:
    if rows := [*table.get(case, {}).values()]:
        checks.add(name, statistics.mean(row.drop for row in rows), len(rows))


def _gain(checks: Checks, table: Table, name: str, other: Method, reduction: float) -> None:
    budget = Budget("size", reduction)
    found = compare(table, Run("cnn", DEFAULT, budget, -1), Run("cnn", other, budget, -1))
    if found is not None:
        checks.byte_ratios[name] = found.worst_byte_ratio
        if found.equal_bytes:
            checks.add(name, found.gain, found.seeds)


def _gaps(checks: Checks, table: Table) -> None:
    """The default against each other criterion; with uniform bits only against such."""
    for ours in [case for case in table if case.method.name == "default" and case.budget.kind == "size"]:
        for theirs in table:
            rival = theirs.method.name != "default" and (theirs.model, theirs.budget) == (ours.model, ours.budget)
            if rival and ours.method.widths in ("mixed", theirs.method.widths):
                found = compare(table, ours, theirs)
                checks.comparisons += [found] if found is not None else []
    fair = [each for each in checks.comparisons if not _larger_file(each)]
    checks.largest_shortfall = min(fair, key=lambda each: each.gain, default=None)
    if judged := [each for each in fair if each.seeds > 1]:  # one seed proves nothing
        worst = min((each.gain for each in checks.behind), default=0.0)
        checks.add("worst_gap_to_best_criterion", worst, min(each.seeds for each in judged))


def _larger_file(each: Comparison) -> bool:
    """Whether the other's files are larger than what counts as equal, so that it may well be ahead."""
    return min(each.byte_ratios) < 1 / EQUAL_BYTES


def _targets(checks: Checks, table: Table) -> None:
    rows = [row for seeds in table.values() for row in seeds.values() if row.target is not None]
    for row in rows:
        error = abs(_excess(row))
        checks.target_errors[row.run.model] = max(error, checks.target_errors.get(row.run.model, 0.0))
    checks.above_target = sorted(row.run.key for row in rows if _excess(row) > 0)
    if rows:
        seeds = min(len(each) for case, each in table.items() if case.budget.kind == "size")
        checks.add("target_size_error", max(checks.target_errors.values()), seeds)


def _excess(row: Row) -> float:
    assert row.target is not None
    return row.bytes / row.target - 1


def _name(reduction: float) -> str:
    return f"{reduction:g}".replace(".", "_")
