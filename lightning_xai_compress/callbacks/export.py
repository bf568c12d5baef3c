"""The stage that ends a fit: files, and the report."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric

from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.calibration import calibration_batches, validation_batches
from lightning_xai_compress.callbacks.console import progress
from lightning_xai_compress.callbacks.pruning import RelevancePruning
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Stage
from lightning_xai_compress.checks import check_names
from lightning_xai_compress.criteria import criterion_name
from lightning_xai_compress.errors import ArtifactError, RelevanceError
from lightning_xai_compress.formats import Artifact, Inputs, check_formats, save
from lightning_xai_compress.plan import Skipped
from lightning_xai_compress.relevance import is_picture, save_heatmaps, split_batch
from lightning_xai_compress.report import Measured, Report, build_report, dense_bytes, evaluate, render

__all__ = ["CompressedExport"]

_EXAMPLES = 4
_PICTURED = 8
_LIBRARIES = ("lightning-xai-compress", "torch", "lightning", "torchao", "torchmetrics", "safetensors", "constriction")


class CompressedExport(CompressionCallback, Stage):
    """Write the compressed model and a report when the fit ends; for images also heat maps, `relevance.png`.

    Args:
        export_dir: Folder for the files and `report.json`; `compressed` in the Trainer's `default_root_dir` where None.
        formats: "safetensors" (entropy-coded, smallest), "onnx" (integer weights for onnxruntime; extra `onnx`).
        metric: What the report calls accuracy: a torchmetrics metric, measured on the validation data when
            compression begins and at the end; or the name of one that the module logs.

    Attributes:
        report: The report of the last fit that ended; None before.

    Raises:
        ValueError: No such format, or (in fit) no validation data for the metric.
        ImportError: The extra that a format needs is not installed.
        ArtifactError: (in fit, before training) the folder cannot be written.
    """

    rank: ClassVar[int] = 3

    def __init__(
        self,
        *,
        export_dir: str | None = None,
        formats: Sequence[str] = ("safetensors",),
        metric: Metric | str | None = None,
    ) -> None:
        super().__init__()
        self.export_dir = export_dir
        self.formats = check_names("formats", formats)
        check_formats(self.formats)
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats must name each format once, and at least one, got {list(self.formats)}")
        if export_dir is not None and not isinstance(export_dir, str | os.PathLike):
            raise ValueError(f"export_dir must be a path, got {export_dir!r}")
        if metric is not None and not (isinstance(metric, Metric) or (isinstance(metric, str) and metric)):
            raise ValueError(
                "metric must be the name of one that the module logs, or a torchmetrics metric that gives one number "
                f"(an object, such as MulticlassAccuracy(10), no class and no collection), got {metric!r}"
            )
        self.metric = metric
        self.report: Report | None = None
        self._dense: dict[str, Any] = {}
        self._logged: dict[str, float] = {}

    def stages(self) -> list[Stage]:
        """This one."""
        return [self]

    def check_settings(self, trainer: Trainer) -> None:
        """Try the folder, on the process that will write."""
        check_formats(self.formats)
        if trainer.is_global_zero:
            check_writable(self._directory(trainer))

    def begin(self, session: Session) -> None:
        """See that there is what the files and the metric need."""
        trainer = session.trainer
        if isinstance(self.metric, Metric):
            if trainer.val_dataloaders is None:
                raise ValueError("metric= is measured on validation data, but this fit has none: give a val_dataloader")
            try:
                self._measure(session, batches=1)
            except (RelevanceError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"metric= cannot be measured; name one that the module logs instead. {error}"
                ) from error
        if "onnx" in self.formats:
            self._examples(session)
        if not self._dense:
            self._dense = asdict(Measured(dense_bytes(session.module)))

    def before_compression(self, session: Session, batch: int) -> None:
        """The last moment of the dense model."""
        epoch = session.epoch(batch)
        accuracy = self._measure(session)
        if isinstance(self.metric, str):
            accuracy, epoch = self._logged.get("value"), self._logged.get("epoch", epoch)
            if accuracy is None:
                rank_zero_warn(
                    f"metric={self.metric!r} was not logged by a validation before compression begins, so the dense "
                    "accuracy is unknown: let warmup be longer, or give a torchmetrics metric"
                )
        self._dense = asdict(Measured(dense_bytes(session.module), accuracy, epoch))

    def advance(self, session: Session, batch: int) -> None:
        """Nothing is due before the end."""

    def after_validation(self, session: Session) -> None:
        """Remember the named metric: a resumed fit begins without it."""
        if isinstance(self.metric, str):
            value = session.trainer.callback_metrics.get(self.metric)
            if isinstance(value, Tensor | float | int):
                epoch = session.epoch(session.position(session.trainer.fit_loop.epoch_loop.batch_idx + 1))
                self._logged = {"value": float(value), "epoch": epoch, "step": session.trainer.global_step}

    def finish(self, session: Session) -> None:
        """Export, measure and tell."""
        self._warn_if_early(session)
        trainer = session.trainer
        named = isinstance(self.metric, str)
        accuracy = self._logged_at_the_end(session, str(self.metric)) if named else self._measure(session)
        if trainer.is_global_zero:
            directory = self._directory(trainer)
            trial = bool(getattr(trainer, "fast_dev_run", False))
            if trial:  # leaves nothing behind, least of all over an earlier export
                directory = Path(tempfile.mkdtemp(prefix="fast_dev_run-"))
            plan = session.latent.plan(tuple(session.skipped))
            artifacts, failed = self._export(session, directory)
            heatmaps = self._draw(session, directory, failed)
            pruning = session.stage(RelevancePruning)
            self.report = build_report(
                session.module,
                plan,
                dense=Measured(**self._dense),
                accuracy=accuracy,
                metric=self._metric_name(),
                criterion=criterion_name(session.criterion),
                heatmaps=heatmaps,
                artifacts=artifacts,
                failed=failed,
                relevance=session.relevance_shares,
                positive_pruned=pruning.positives if pruning is not None else 0,
                halted=session.halted,
                history=session.history,
                versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
            )
            self.report.write(directory / "report.json")
            print(f"\n{render(self.report)}\n\nreport: {directory / 'report.json'}")
            if trial:
                shutil.rmtree(directory)
        trainer.strategy.barrier("lightning_xai_compress export")

    def _export(self, session: Session, directory: Path) -> tuple[list[Artifact], list[Skipped]]:
        plan = session.latent.plan(tuple(session.skipped))
        examples = self._examples(session) if "onnx" in self.formats else []
        artifacts, failed = [], []
        with progress(session.trainer, "export", len(self.formats)) as advance:
            for name in self.formats:
                try:
                    artifacts += save(session.module, plan, directory, formats=[name], examples=examples)
                except ArtifactError as error:  # one format must not cost the user the others
                    failed.append(Skipped(name, str(error)))
                    rank_zero_warn(f"format {name!r} was not written: {error}")
                advance()
        return artifacts, failed

    def _draw(self, session: Session, directory: Path, failed: list[Skipped]) -> str:
        """A picture of what the final model looks at in a few training images; "" where inputs are no images."""
        batches = calibration_batches(session.trainer, samples=1, seed=session.scoring.seed)
        try:
            found = session.score(batches, criterion="lrp", seed=0, statistics=(), heatmaps=_PICTURED).heatmaps
            if found is None or not is_picture(found):
                return ""
            save_heatmaps(found, directory / "relevance.png")
        except Exception as error:  # whatever it is, a picture must not cost the user the report
            failed.append(Skipped("relevance.png", str(error)))
            return ""
        return "relevance.png"

    def _measure(self, session: Session, *, batches: int | None = None) -> float | None:
        if not isinstance(self.metric, Metric):
            return None
        trainer = session.trainer
        validating = trainer.validating
        trainer.validating = True  # the batch hooks ask
        try:
            with isolate_rng(), trainer.precision_plugin.forward_context():
                return evaluate(session.module, islice(validation_batches(trainer), batches), self.metric)
        finally:
            if not validating:
                trainer.training = True

    def _logged_at_the_end(self, session: Session, name: str) -> float | None:
        """The named metric, if it is that of the final weights."""
        trainer = session.trainer
        if not self._logged and name in trainer.callback_metrics:  # no validation: logged in training
            return float(trainer.callback_metrics[name])
        if not self._logged:
            rank_zero_warn(
                f"metric={name!r} was never logged, so accuracies are unknown; logged were "
                f"{sorted(trainer.callback_metrics)}"
            )
            return None
        if self._logged["step"] != trainer.global_step:
            rank_zero_warn(
                f"metric={name!r} was last measured at epoch {self._logged['epoch']:g}, not on the final "
                "weights, so the compressed accuracy is unknown: let the last epoch validate "
                "(check_val_every_n_epoch), or give a torchmetrics metric"
            )
            return None
        return self._logged["value"]

    def _metric_name(self) -> str:
        name = self.metric if isinstance(self.metric, str) else type(self.metric).__name__
        return "" if self.metric is None else f"{name} (validation data)"

    def _examples(self, session: Session) -> list[Inputs]:
        """A few real inputs, one sample batch each; the module's `example_input_array` where a batch does not tell.

        Raises:
            ValueError: Neither is there.
        """
        batches = calibration_batches(session.trainer, samples=1, seed=session.scoring.seed)
        try:
            args, kwargs, _ = split_batch(next(iter(batches)))
        except RelevanceError as error:
            example = session.module.example_input_array
            if example is None:
                raise ValueError(
                    f"formats contains 'onnx', but the model's input is not known: set example_input_array on the "
                    f"LightningModule ({error})"
                ) from error
            if isinstance(example, dict):
                return [Inputs((), example)]
            return [Inputs(tuple(example) if isinstance(example, tuple) else (example,))]
        return [
            Inputs(tuple(_slice(arg, index) for arg in args), {key: _slice(arg, index) for key, arg in kwargs.items()})
            for index in islice((slice(0, 2), slice(2, 6), slice(6, 14)), _EXAMPLES)
            if _length(args, kwargs) > index.start
        ]

    def _directory(self, trainer: Trainer) -> Path:
        return Path(self.export_dir) if self.export_dir is not None else Path(trainer.default_root_dir) / "compressed"

    def _warn_if_early(self, session: Session) -> None:
        undone = [stage for stage in session.stages if not stage.complete]
        if undone and not session.halted:
            names = " and ".join(type(stage).__name__ for stage in undone)
            rank_zero_warn(
                f"the fit ended at epoch {session.trainer.current_epoch} before {names} had done its work (early "
                "stopping, or a time limit?): the files hold the model as it is"
            )

    def state(self) -> dict[str, Any]:
        """The dense model's figures, and the latest logged metric."""
        return {"dense": self._dense, "logged": self._logged}

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        self.report = None
        self._dense = dict(state.get("dense", {}))
        self._logged = dict(state.get("logged", {}))


def check_writable(directory: Path) -> None:
    """Write and remove a small file.

    Raises:
        ArtifactError: It cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=directory)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise ArtifactError(f"export_dir {directory} cannot be written ({error}): name another folder") from error


def _slice(value: Any, index: slice) -> Any:
    return value[index] if isinstance(value, Tensor) and value.dim() else value


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), 1)
