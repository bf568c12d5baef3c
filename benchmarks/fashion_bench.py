"""Accuracy at equal bytes on the real Fashion-MNIST: the package's defaults against other criteria, on three networks.

    python benchmarks/fashion_bench.py [--only PATTERN] [--seeds N ...] [--jobs N] [--again] [--quick] [--report] [--list]
                                       [--output FILE.json] [--docs FOLDER] [--cache FOLDER]

Everything starts from the same dense checkpoint of 10 epochs. "dense" in the tables is that checkpoint trained on for 6
epochs without compression; a method compresses it in the same 6 epochs, and what counts is its file: its bytes, and
the accuracy of the network read back from it. Choices belong on the 5,000 validation images; the test images are read
once a run.

Results go to benchmarks/results/fashion_mnist.json after every run, and an interrupted benchmark goes on where it
was: a run that is there is not done again, unless the recipe, its settings or its dense checkpoint have changed, or
with `--again`. `--only` is a shell pattern on keys such as "cnn/lamp-mixed/98.5/seed0". Dense checkpoints are kept in
artifacts/benchmark. At the end (or with `--report` alone) checks, docs/benchmark.md and its plots are written.
"""  # noqa: E501

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from common import RESULTS
from fashion_book import Book
from fashion_fit import fit_base, fit_run, kept_weights, prepare
from fashion_grid import FULL, QUICK, bases_of, queue, quick_runs, runs, selected
from fashion_report import checks_table
from fashion_tasks import CONTROL, DENSE, Base, BaseResult, Run, RunResult, Task

__all__ = ["main", "work"]

ROOT = Path(__file__).resolve().parents[1]


def work(
    chosen: Iterable[Run],
    book: Book,
    submit: Callable[[Task], Future[Any]],
    *,
    jobs: int,
    kept: Callable[[Base], str | None],
    again: bool = False,
) -> list[Task]:
    """Do what is not done, so many at once, the first that is possible first; what failed is returned.

    Args:
        chosen: Runs; the bases that they need come with them.
        book: Says what is done, and is told.
        submit: Begins a task.
        jobs: How many at once.
        kept: Digest of a dense checkpoint that is there to start from.
        again: Do the chosen runs in any case.
    """
    chosen = [*chosen]
    open_runs = {run for run in chosen if again or book.run(run) is None}
    needed = {base for run in open_runs for base in bases_of(run)}
    waiting, running = queue(chosen), dict[Future[Any], Task]()
    done, failed = set[Task](), list[Task]()

    def due(task: Task) -> bool:
        if isinstance(task, Run):
            return task in open_runs or book.run(task) is None
        entry = book.base(task)
        return entry is None or (task in needed and task.kind == DENSE and kept(task) != entry["weights"])

    def before(task: Task) -> list[Base]:
        if isinstance(task, Run):
            return bases_of(task)
        return [Base(task.model, task.seed, DENSE)] if task.kind == CONTROL else []

    def following() -> Task | None:
        for task in [*waiting]:
            if any(base in failed for base in before(task)):
                waiting.remove(task)
                failed.append(task)
            elif all(base in done for base in before(task)):
                waiting.remove(task)
                if due(task):
                    return task
                done.add(task)
        return None

    while waiting or running:
        while len(running) < jobs and (task := following()) is not None:
            running[submit(task)] = task
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool:
                raise
            except Exception as error:
                failed.append(task)
                book.fail(task, error)
                traceback.print_exception(error)
                print(f"{task.key}: {type(error).__name__}: {error}", flush=True)
            else:
                done.add(task)
                book.record(task, result)
                tell(task, result, len(running) + sum(due(each) for each in waiting))
    return failed


def tell(task: Task, result: BaseResult | RunResult, left: int) -> None:
    """One line on the console."""
    size = ""
    if isinstance(result, RunResult):
        size = f", {result.bytes:,} bytes ({100 * result.reduction:.2f} % smaller)"
    print(f"{task.key}: test {result.test:.2f}{size}, {result.seconds:.0f} s; {left} left", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Accuracy at equal bytes on Fashion-MNIST.")
    parser.add_argument("--only", default="*", help="shell pattern on keys such as cnn/lamp-mixed/98.5/seed0")
    parser.add_argument("--seeds", type=int, nargs="+", help="these alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, of one thread each")
    parser.add_argument("--again", action="store_true", help="also what is in the results already")
    parser.add_argument("--quick", action="store_true", help="few runs on few images, only to see that it runs")
    parser.add_argument("--report", action="store_true", help="run nothing: checks, page and plots from the results")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--docs", type=Path, help="folder of benchmark.md and plots/")
    parser.add_argument("--cache", type=Path, help="folder of dense checkpoints and compressed files")
    arguments = parser.parse_args()
    quick = "_quick" if arguments.quick else ""
    recipe, every = (QUICK, quick_runs()) if quick else (FULL, runs())
    output = arguments.output or RESULTS / f"fashion_mnist{quick}.json"
    cache = (arguments.cache or Path(f"artifacts/benchmark{quick}")).resolve()
    docs = arguments.docs or (cache / "docs" if quick else ROOT / "docs")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    prepare()
    chosen = selected(every, arguments.only, arguments.seeds)
    book = Book(output, recipe, every)
    if arguments.list:
        open_runs = [run.key for run in chosen if arguments.again or book.run(run) is None]
        print("\n".join(open_runs), f"\n{len(open_runs)} of {len(chosen)} to run", sep="")
        return 0
    failed: list[Task] = []
    if not arguments.report:
        book.begin()
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), prepare) as pool:

            def submit(task: Task) -> Future[Any]:
                if isinstance(task, Base):
                    return pool.submit(fit_base, task, recipe, cache)
                return pool.submit(fit_run, task, recipe, cache)

            def kept(base: Base) -> str | None:
                return kept_weights(base, recipe, cache)

            failed = work(chosen, book, submit, jobs=arguments.jobs, kept=kept, again=arguments.again)
    checks = book.report(docs)
    print(f"\n{checks_table(checks)}\n{output}\n{docs / 'benchmark.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
