"""What is seen while it runs: progress bars that live with Lightning's own, and the schedule."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

__all__ = ["progress"]


@contextmanager
def progress(trainer: Trainer, label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar for as long as the block runs, beside whatever bar the Trainer shows; none where it shows none."""
    shown = trainer.progress_bar_callback
    if isinstance(shown, RichProgressBar) and shown.is_enabled and shown.progress is not None:
        task = shown.progress.add_task(f"[white]{label}", total=total)
        try:
            yield lambda: shown.progress.advance(task)  # type: ignore[union-attr]
        finally:
            shown.progress.remove_task(task)
    elif isinstance(shown, TQDMProgressBar) and shown.is_enabled:
        position = 2 * shown.process_position + (shown._train_progress_bar is not None)
        with Tqdm(desc=label, total=total, position=position, leave=False, file=sys.stdout, dynamic_ncols=True) as bar:
            yield lambda: bar.update(1)
    else:
        yield lambda: None
