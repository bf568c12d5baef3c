"""The results of the Fashion-MNIST benchmark on disk: what is done, what of it still holds, what follows from it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning_xai_compress

from common import Results, environment
from fashion_checks import LIMITS, Checks, Row, checks_of, table_of
from fashion_grid import MODELS, Recipe, bases_of, fingerprint
from fashion_report import write
from fashion_tasks import CONTROL, DENSE, Base, BaseResult, Run, RunResult, Task

__all__ = ["Book"]

PACKAGE = Path(lightning_xai_compress.__file__).parent


class Book:
    """One JSON file: the figures of every task as they come, and the checks that follow from them.

    Args:
        path: Of the file; taken up where there is one.
        recipe: Results of another one are not used.
        every: All runs that there are.
    """

    def __init__(self, path: Path, recipe: Recipe, every: Iterable[Run]) -> None:
        self.recipe = recipe
        self.every = [*every]
        content = json.loads(path.read_text()) if path.exists() else {}
        for name in ("bases", "runs", "failed"):
            content.setdefault(name, {})
        self.results = Results(path, **content)
        self.code = _code()

    def begin(self) -> None:
        """Note what is about to run; an environment that differs from the latest one is added, not put in its place."""
        content = self.results.content
        now = environment(sorted({run.seed for run in self.every}))
        known = content.get("environments", [])
        if not known or {**known[-1], "load": 0} != {**now, "load": 0}:
            known = [*known, now]
        self.results.add(environments=known, settings=asdict(self.recipe), limits=LIMITS)

    def base(self, base: Base) -> dict[str, Any] | None:
        """The entry of a base that holds: of this recipe, and a control of the present dense checkpoint."""
        found: dict[str, Any] | None = self.results.content["bases"].get(base.key)
        if found is None or found["recipe"] != fingerprint(self.recipe, base):
            return None
        if base.kind == CONTROL:
            dense = self.base(Base(base.model, base.seed, DENSE))
            return found if dense is not None and dense["weights"] == found["start"] else None
        return found

    def run(self, run: Run) -> dict[str, Any] | None:
        """The entry of a run that holds: of this recipe, these settings and the present dense checkpoint."""
        found: dict[str, Any] | None = self.results.content["runs"].get(run.key)
        dense, control = (self.base(base) for base in bases_of(run))
        if found is None or dense is None or control is None or found["recipe"] != fingerprint(self.recipe, run):
            return None
        return found if found["start"] == dense["weights"] else None

    def record(self, task: Task, result: BaseResult | RunResult) -> None:
        """Put a result on disk; after a run, what follows from it, too."""
        content = self.results.content
        content["failed"].pop(task.key, None)
        if isinstance(task, Base):
            self.results.add("bases", **{task.key: asdict(result) | {"code": self.code}})
            return
        assert isinstance(result, RunResult)
        control = self.base(Base(task.model, task.seed, CONTROL))
        assert control is not None, "a run follows its control"
        figures = asdict(result) | {"reduction": result.reduction, "control_test": control["test"], "code": self.code}
        content["runs"][task.key] = task.to_dict() | figures
        self.results.add(**self.checks().to_dict())

    def fail(self, task: Task, error: BaseException) -> None:
        """Put on disk that there is no result."""
        self.results.add("failed", **{task.key: f"{type(error).__name__}: {error}"})

    def rows(self) -> list[Row]:
        """All that hold, in the order of the runs."""
        entries = (self.run(run) for run in self.every)
        return [Row.read(entry) for entry in entries if entry is not None]

    def controls(self) -> dict[str, dict[int, float]]:
        """Test accuracy of the controls by model and seed."""
        found: dict[str, dict[int, float]] = {model: {} for model in MODELS}
        for base in dict.fromkeys(Base(run.model, run.seed, CONTROL) for run in self.every):
            entry = self.base(base)
            if entry is not None:
                found[base.model][base.seed] = entry["test"]
        return found

    def checks(self) -> Checks:
        """Figures with limits, of the rows that hold."""
        return checks_of(table_of(self.rows()))

    def report(self, docs: Path) -> Checks:
        """Write checks into the results, and the page with its plots."""
        checks = self.checks()
        self.results.add(**checks.to_dict())
        write(
            docs,
            table=table_of(self.rows()),
            controls=self.controls(),
            checks=checks,
            recipe=self.recipe,
            environments=self.results.content.get("environments", []),
            code=sorted({entry["code"] for run in self.every if (entry := self.run(run)) is not None}),
            remarks=self.remarks(),
        )
        return checks

    def remarks(self) -> list[str]:
        """What failed, and what is not done."""
        failed = self.results.content["failed"]
        lines = [f"failed: {run.key}: {' '.join(failed[run.key].split())}" for run in self.every if run.key in failed]
        missing = [run.key for run in self.every if self.run(run) is None and run.key not in failed]
        for model in MODELS:
            keys = [key for key in missing if key.startswith(f"{model}/")]
            if keys:
                shown = f"{', '.join(keys[:4])}{' and so on' if len(keys) > 4 else ''}"
                lines.append(f"not run yet, or with other settings: {len(keys)} of {model} ({shown})")
        return lines


def _code() -> str:
    """Commit of the package, with a plus where files differ from it, and a digest of its sources."""
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py")))).hexdigest()[:8]
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    told = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=False)
    return f"{told.stdout.strip() or 'no commit'} ({sources})"
