"""How the report of a fit reaches the process that asked for the fit."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Any

from lightning_xai_compress.report import Report

__all__ = ["Outcome"]


class Outcome:
    """The report of the last fit.

    Under `ddp_spawn`, `ddp_fork` and `ddp_notebook` a fit runs in workers that were given a copy of the callback, and
    what they set is lost. So a worker also leaves the report in a file of the temporary folder, under a name that
    only this object and its copies know. The process that made the object takes it from there and removes it.
    """

    def __init__(self) -> None:
        self._report: Report | None = None
        self._copied = False
        self._ask()

    def _ask(self) -> None:
        """This process is the one that asks for fits."""
        self._maker = os.getpid()
        self._path = Path(tempfile.gettempdir()) / f"lightning_xai_compress-{uuid.uuid4().hex}-{self._maker}.json"
        weakref.finalize(self, _remove, self._maker, self._path)

    @property
    def report(self) -> Report | None:
        """Of the last fit; None where it wrote none."""
        self._settle()
        if os.getpid() == self._maker and self._path.exists():
            self._report = Report.read(self._path) if self._path.stat().st_size else None
            self._path.unlink()
        return self._report

    def begin(self, *, leave: bool) -> None:
        """A fit begins in this process: what an earlier one left is gone, even if nothing follows.

        Args:
            leave: Whether this is the worker that leaves it for the process that asked: one on each machine.
        """
        self._settle()
        self._report = None
        if leave and self._is_worker():
            self._leave("")
        _remove(self._maker, self._path)

    def keep(self, report: Report | None, *, leave: bool) -> None:
        """A fit ends in this process.

        Args:
            report: Of the fit.
            leave: As for `begin`.
        """
        self._report = report
        if leave and report is not None and self._is_worker():
            self._leave(report.to_json())

    def clear(self) -> None:
        """A fit has failed, here or in a worker."""
        self._settle()
        self._report = None
        _remove(self._maker, self._path)

    def _is_worker(self) -> bool:
        parent = multiprocessing.parent_process()
        return parent is not None and parent.pid == self._maker

    def _leave(self, text: str) -> None:
        self._path.unlink(missing_ok=True)
        with open(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(text)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._copied = True  # a process that is being spawned does not know of its parent yet

    def _settle(self) -> None:
        """A copy outside of a worker has fits of its own."""
        if self._copied and not self._is_worker():
            self._ask()
        self._copied = False


def _remove(maker: int, path: Path) -> None:
    """Only where it is awaited: workers that were forked run this, too."""
    if os.getpid() == maker:
        path.unlink(missing_ok=True)
