"""What the benchmarks share: the record of what ran, paired timing, peaks of memory, results written as they come."""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "RESULTS",
    "Peak",
    "Results",
    "Timing",
    "environment",
    "paired",
    "peak_memory",
    "print_checks",
    "ratio",
    "resident_peak",
]

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("lightning-xai-compress", "torch", "torchvision", "torchao", "lightning", "zennit", "captum", "numpy")

Task = Callable[[], object]


def environment(seeds: Iterable[int]) -> dict[str, Any]:
    """What a figure depends on: versions, processor, threads, load at the start, seeds."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "seeds": list(seeds),
    }


class Results:
    """A JSON file that is rewritten with every entry, so that an interrupted run leaves what it measured.

    Args:
        path: Of the file.
        header: First entries.
    """

    def __init__(self, path: Path, **header: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = dict(header)
        self._write()

    def add(self, *keys: str, **values: Any) -> None:
        """Put values below nested keys."""
        at = self.content
        for key in keys:
            at = at.setdefault(key, {})
        at.update(values)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(".part")
        text = json.dumps(self.content, indent=1)
        # lists of numbers on one line
        text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
        half.write_text(text + "\n")
        half.replace(self.path)


@dataclass(frozen=True)
class Timing:
    """Seconds of each round.

    Args:
        cpu: Of the processor, all threads together: what other processes do disturbs it least.
        wall: On the clock.
    """

    cpu: list[float]
    wall: list[float]


def paired(tasks: Mapping[str, Task], *, rounds: int) -> dict[str, Timing]:
    """Time tasks in turn, round by round, every other round backwards, so that drift meets all of them alike.

    Warm up first: the first call of a task is timed as any other.
    """
    timings = {name: Timing([], []) for name in tasks}
    for index in range(rounds):
        for name in [*tasks][:: 1 if index % 2 == 0 else -1]:
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            tasks[name]()
            timings[name].cpu.append(time.process_time() - cpu)
            timings[name].wall.append(time.perf_counter() - wall)
    return timings


def ratio(seconds: list[float], base: list[float]) -> float:
    """Median over rounds of the ratio within each round."""
    return statistics.median(one / other for one, other in zip(seconds, base, strict=True))


@dataclass(frozen=True)
class Peak:
    """Most memory in use during a task, beyond what was in use before it.

    Args:
        tensor_bytes: By the calls of torch's CPU allocator, exact and repeatable.
        resident_bytes: Of the process, which counts libraries' scratch memory, too, and depends on how malloc returns
            memory.
    """

    tensor_bytes: int
    resident_bytes: int


def peak_memory(task: Task, undo: Task = lambda: None) -> Peak:
    """Run a task twice, once for either measure, best in a process of its own with all libraries warmed up.

    Args:
        task: What it returns or leaves behind counts.
        undo: Frees what the task leaves behind.
    """
    gc.collect()
    resident = resident_peak(task)
    undo()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    events: Any = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return Peak(max(accumulate(size for _, size in changes)), resident)


def resident_peak(task: Task) -> int:
    """Bytes that the process takes at most during a task, beyond those before it."""
    status = Path("/proc/self/status")
    if not status.exists():  # the high-water mark cannot be reset, so it counts only where the task raises it
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        task()
        return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    def kilobytes(key: str) -> int:
        return int(re.findall(rf"{key}:\s+(\d+) kB", status.read_text())[0])

    # ru_maxrss is not used: a child process inherits it from its parent
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    before = kilobytes("VmRSS")
    task()
    return 1024 * (kilobytes("VmHWM") - before)


def print_checks(checks: Mapping[str, float], limits: Mapping[str, float]) -> None:
    """A table of figures with their upper limits."""
    print(f"{'check':28}{'measured':>10}{'limit':>8}")
    for name, limit in limits.items():
        verdict = "" if checks[name] <= limit else "  above the limit"
        print(f"{name:28}{checks[name]:10.3f}{limit:8.2f}{verdict}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"model name\s*:\s*(.+)", information.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
