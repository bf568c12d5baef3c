"""The modules of the Fashion-MNIST benchmark, and rows of results made up for tests."""

import importlib
from pathlib import Path
from types import SimpleNamespace

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
DENSE_BYTES = 1_361_920
ISSUE_CHECKS = [
    "drop_at_97_5", "drop_at_98_5", "drop_at_99", "gain_over_magnitude_uniform4_at_97_5",
    "gain_over_magnitude_uniform4_at_98_5", "gain_over_magnitude_uniform4_at_99", "gain_over_lamp_mixed_at_98_5",
    "gain_over_lamp_mixed_at_99", "worst_gap_to_best_criterion", "nonpositive_drop_at_50", "nonpositive_drop_at_90",
    "target_size_error", "max_drop_0_5_test_drop", "max_drop_0_5_reduction",
]  # fmt: skip


def modules(monkeypatch):
    """The modules of the benchmark, without their prefix."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = ("bench", "book", "checks", "fit", "grid", "plot", "report", "tasks")
    return SimpleNamespace(**{name: importlib.import_module(f"fashion_{name}") for name in names})


def run_of(bench, method="default", value=97.5, *, model="cnn", widths="mixed", kind="size", seed=0):
    return bench.tasks.Run(model, bench.tasks.Method(method, widths), bench.tasks.Budget(kind, value), seed)


def rows(bench, tests, method="default", value=97.5, *, control=93.0, size=34_000, **of):
    """A row a seed, of these test accuracies; the first one belongs to seed 0."""
    return [
        bench.checks.Row(
            test, test, size, DENSE_BYTES, 34_048 if of.get("kind", "size") == "size" else None, 0.9, 3.0, 1.0,
            9, "", "", run=run_of(bench, method, value, seed=seed, **of), control_test=control,
        )
        for seed, test in enumerate(tests)
    ]  # fmt: skip
