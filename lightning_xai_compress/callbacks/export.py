"""The stage that ends a fit: files, and the report."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics import Metric

from lightning_xai_compress.callbacks.accuracy import Accuracy
from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.best import Mode, best_of
from lightning_xai_compress.callbacks.calibration import calibration_batches
from lightning_xai_compress.callbacks.console import progress
from lightning_xai_compress.callbacks.inputs import example_inputs
from lightning_xai_compress.callbacks.monitor import CompressedMetric
from lightning_xai_compress.callbacks.outcome import Outcome
from lightning_xai_compress.callbacks.precision import MixedPrecision
from lightning_xai_compress.callbacks.processes import Processes
from lightning_xai_compress.callbacks.pruning import RelevancePruning
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Stage
from lightning_xai_compress.checks import check_names
from lightning_xai_compress.criteria import criterion_name
from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import (
    FORMATS,
    Artifact,
    Files,
    Inputs,
    check_formats,
    check_traceable,
    finished,
    round_module,
    save,
)
from lightning_xai_compress.formats.onnx import OnnxModule
from lightning_xai_compress.plan import CompressionPlan, Skipped
from lightning_xai_compress.relevance import is_picture, save_heatmaps
from lightning_xai_compress.report import (
    DenseSizes,
    Measured,
    Report,
    build_report,
    check_mode,
    dense_bytes,
    dense_sizes,
    render,
)
from lightning_xai_compress.structure import Kept, shrunk_plan

__all__ = ["CompressedExport"]

_RANGE_SAMPLES = 256
_PICTURED = 8
_LIBRARIES = ("lightning-xai-compress", "torch", "lightning", "torchao", "torchmetrics", "safetensors", "constriction")


class CompressedExport(CompressionCallback, Stage):
    """Write the compressed model and a report when the fit ends; for images also heat maps, `relevance.png`.

    Args:
        export_dir: Folder for the files and `report.json`; `compressed` in the Trainer's `default_root_dir` where None.
        formats: "safetensors" (entropy-coded, smallest), "onnx" (integer weights for onnxruntime; extra `onnx`), "pt2"
            (torch.export, packed integers).
        metric: What the report calls accuracy: a torchmetrics metric, measured on the validation data when
            compression begins and at the end; or the name of one that the module logs. Other callbacks find that of the
            compressed model as `compressed_<metric>` (or class of a torchmetrics metric) from the first epoch on; until
            compression is done it is worse than any measured value.
        export: "last": the final weights; "best": those of the validation at which `metric` was best, of all that
            came after pruning and quantization were done. The module keeps its final weights either way.
        mode: Whether "max" or "min" of the metric is best; None: what a torchmetrics metric says of itself.
        files: How files are written.

    Attributes:
        report: The report of the last fit; None before, and where that raised an error.

    Raises:
        ValueError: No such format, or (in fit) no validation data for the metric.
        ImportError: The extra that a format needs is not installed.
        ArtifactError: (in fit, before training) the folder cannot be written.
    """

    rank: ClassVar[int] = 5

    def __init__(
        self,
        *,
        export_dir: str | None = None,
        formats: Sequence[str] = ("safetensors",),
        metric: Metric | str | None = None,
        export: Literal["last", "best"] = "last",
        mode: Mode | None = None,
        files: Files | None = None,
    ) -> None:
        super().__init__()
        self.export_dir = export_dir
        self.formats = check_names("formats", formats)
        check_formats(self.formats)
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats must name each format once, and at least one, got {list(self.formats)}")
        if export_dir is not None and not isinstance(export_dir, str | os.PathLike):
            raise ValueError(f"export_dir must be a path, got {export_dir!r}")
        self.accuracy = Accuracy(metric)
        self.files = files or Files()
        if self.files.activations and "onnx" not in self.formats:
            raise ValueError(
                f"activations={self.files.activations!r} is a way to write ONNX, but formats={list(self.formats)}: "
                "add 'onnx', or leave activations out"
            )
        self.mode = mode = check_mode(mode, metric)
        self.best = best_of(export, mode, metric)
        self.compressed = CompressedMetric(self.accuracy.label, mode)
        self._outcome = Outcome()
        self._dense: dict[str, Any] = {}
        self._dense_sizes: dict[str, int] = {}

    def stages(self) -> list[Stage]:
        """This one."""
        return [self]

    @property
    def report(self) -> Report | None:
        """The report of the last fit, in every process and in that which asked for the fit; None before."""
        return self._outcome.report

    def failed(self) -> None:
        """There is no report, and an earlier one is not of this fit."""
        self._outcome.clear()

    def check_settings(self, trainer: Trainer) -> None:
        """Try the folder, on the process that will write."""
        self._outcome.begin(leave=trainer.local_rank == 0)
        check_formats(self.formats)
        with Processes(trainer).together():
            if trainer.is_global_zero:
                check_writable(self._directory(trainer))

    def begin(self, session: Session) -> None:
        """See that there is what the files and the metric need."""
        self.accuracy.begin(session)
        precision = session.stage(MixedPrecision)
        widths = dict(precision.quantization.widths) if precision is not None else {}
        widest = max([*precision.bits, *widths.values()]) if precision is not None else 0
        if "onnx" in self.formats and precision is not None and widest > max(self.files.onnx_bits):
            also = f" (widths={widths})" if widths else ""
            raise ValueError(
                f"bits={precision.bits}{also} asks for up to {widest} bits, but onnx_bits="
                f"{tuple(self.files.onnx_bits)} allows at most {max(self.files.onnx_bits)} in the ONNX file: leave the "
                "larger bits out, or allow 8"
            )
        if self.files.activations and precision is not None:
            precision.check_integer_kernels(session)
        self._check_tracing(session)
        self.compressed.publish(session.trainer, None, progress=session.progress())
        if not self._dense:
            self._dense = asdict(Measured(dense_bytes(session.module)))

    def before_compression(self, session: Session, batch: int) -> None:
        """The last moment of the dense model."""
        accuracy, epoch = self.accuracy.before_compression(session, session.epoch())
        self._dense = asdict(Measured(dense_bytes(session.module), accuracy, epoch))
        if session.trainer.is_global_zero:
            self._dense_sizes = asdict(dense_sizes(session.module, session.latent.parameters))

    def advance(self, session: Session, batch: int) -> None:
        """Nothing is due before the end."""

    @property
    def metric_key(self) -> str:
        """`compressed_` and the name of the metric."""
        return self.compressed.key

    def before_validation(self, session: Session) -> None:
        """What is logged so far is of earlier weights."""
        self.accuracy.before_validation(session)

    def after_validation(self, session: Session) -> None:
        """Remember the named metric, publish that of the compressed model, and keep the best weights."""
        self.accuracy.after_validation(session)
        value = self.accuracy.of_validation(session) if session.complete or session.budget is not None else None
        for stage in session.stages:
            stage.measured(session, value)
        value = value if session.complete else None
        self.compressed.publish(session.trainer, value, progress=session.progress())
        if self.best is not None and value is not None and self.best.beaten_by(value):
            latent = session.averaging.latent_state()
            self.best.keep(value, session.epoch_after_batch(), session.module, latent)

    def after_epoch(self, session: Session) -> None:
        """Without validation, a named metric is that of training."""
        if not self.accuracy.measures and not sum(session.trainer.num_val_batches):
            value = self.accuracy.of_training(session)
            shown = value if session.complete else None
            self.compressed.publish(session.trainer, shown, progress=session.progress())

    def finish(self, session: Session) -> None:
        """Export, measure and tell."""
        self._warn_if_early(session)
        self._round(session)
        trainer = session.trainer
        accuracy = self.accuracy.at_the_end(session)
        report: Report | None = None
        with ExitStack() as stack:
            directory = self._directory(trainer)
            if getattr(trainer, "fast_dev_run", False):  # leaves nothing behind, least of all over an earlier export
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fast_dev_run-")))
            if trainer.is_global_zero:
                with self._weights(session):
                    self._round(session)
                    names = set(session.latent.parameters)
                    with session.smaller() as kept, finished(session.module, self.files, names) as left:
                        self._skip(session, left)
                        report = self._write(session, directory, accuracy, kept)
            int8 = self._int8_accuracy(session, report)
            if report is not None:
                report = replace(report, int8_accuracy=int8)
                report.write(directory / "report.json")
                print(f"\n{render(report)}\n\nreport: {directory / 'report.json'}")
        self._outcome.keep(session.processes.shared(report), leave=trainer.local_rank == 0)

    def _int8_accuracy(self, session: Session, report: Report | None) -> float | None:
        """The metric of the ONNX file with 8-bit activations: each process runs it on its share of the data.

        Args:
            session: Of the fit.
            report: On the process that wrote the file; None on the others.
        """
        if not self.files.activations or not self.accuracy.measures:
            return None
        written = next((each.path for each in report.artifacts if each.format == "onnx"), None) if report else None
        content = session.processes.shared(Path(written).read_bytes() if written else None)
        if content is None:
            return None
        with tempfile.TemporaryDirectory() as folder:  # the file may be on another machine
            path = Path(folder) / "model.onnx"
            path.write_bytes(content)
            return self.accuracy.measure(session, model=OnnxModule(path))

    @property
    def dense_accuracy(self) -> float | None:
        """The metric when compression began."""
        return self._dense.get("accuracy")

    def _round(self, session: Session) -> None:
        """What is not quantized becomes float16, in the module, so that files stay exact."""
        self._skip(session, round_module(session.module, self.files, set(session.latent.parameters)))

    def _skip(self, session: Session, left: Sequence[Skipped]) -> None:
        """Name what stays as it is, once."""
        session.skipped += [entry for entry in left if entry not in session.skipped]

    def _write(self, session: Session, directory: Path, accuracy: float | None, kept: Kept) -> Report:
        """Files, picture and report of the weights that the module holds."""
        best = self.best if self.best is not None and self.best.value is not None else None
        plan = session.latent.plan(
            tuple(session.skipped), state=best.latent if best else None, provenance=session.provenance
        )
        plan = shrunk_plan(plan, kept) if kept else plan
        artifacts, failed = self._export(session, plan, directory)
        heatmaps = self._draw(session, directory, failed)
        pruning = session.stage(RelevancePruning)
        return build_report(
            session.module,
            plan,
            dense=Measured(**self._dense),
            accuracy=best.value if best else accuracy,
            dense_sizes=DenseSizes(**self._dense_sizes) if self._dense_sizes else None,
            exported_epoch=best.epoch if best else None,
            metric=self.accuracy.name,
            criterion=criterion_name(session.scorer.criterion),
            heatmaps=heatmaps,
            artifacts=artifacts,
            failed=failed,
            relevance=session.relevance_shares,
            positive_pruned=pruning.positives if pruning is not None else 0,
            halted=session.halted,
            history=session.history,
            budget=session.budget.outcome if session.budget is not None else "",
            path=session.budget.path if session.budget is not None else (),
            versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
        )

    def _export(self, session: Session, plan: CompressionPlan, directory: Path) -> tuple[list[Artifact], list[Skipped]]:
        examples = self._examples(session) if self._traced() else []
        artifacts, failed = [], []
        with progress(session.trainer, "export", len(self.formats)) as advance:
            for name in self.formats:
                try:
                    artifacts += save(
                        session.module, plan, directory, formats=[name], examples=examples, files=self.files
                    )
                except ArtifactError as error:  # one format must not cost the user the others
                    failed.append(Skipped(name, str(error)))
                    rank_zero_warn(f"format {name!r} was not written: {error}")
                advance()
        return artifacts, failed

    def _draw(self, session: Session, directory: Path, failed: list[Skipped]) -> str:
        """A picture of what the final model looks at in a few training images; "" where inputs are no images."""
        batches = calibration_batches(session.trainer, samples=1, seed=session.scorer.settings.seed)
        try:
            found = session.scorer.score(batches, criterion="lrp", seed=0, statistics=(), heatmaps=_PICTURED).heatmaps
            if found is None or not is_picture(found):
                return ""
            save_heatmaps(found, directory / "relevance.png")
        except Exception as error:  # whatever it is, a picture must not cost the user the report
            failed.append(Skipped("relevance.png", str(error)))
            return ""
        return "relevance.png"

    def _traced(self) -> tuple[str, ...]:
        return tuple(name for name in self.formats if FORMATS[name].traces)

    def _examples(self, session: Session) -> list[Inputs]:
        return example_inputs(session, self._traced(), samples=_RANGE_SAMPLES if self.files.activations else 0)

    def _check_tracing(self, session: Session) -> None:
        """Say before training what cannot be traced; refuse where no other file would be left."""
        traced = self._traced()
        if not traced:
            return
        problems: dict[str, ArtifactError] = {}
        if "onnx" in traced and any(each.dtype == torch.bfloat16 for each in session.module.parameters()):
            reason = "onnxruntime has no bfloat16 kernels on the CPU; train in float32, or with bf16-mixed"
            problems["onnx"] = ArtifactError(reason)
        try:
            check_traceable(session.module, self._examples(session))
        except ArtifactError as error:
            problems = dict.fromkeys(traced, error)
        if len(problems) == len(self.formats):
            raise next(iter(problems.values()))
        for problem in dict.fromkeys(problems.values()):
            names = [repr(name) for name in traced if problems.get(name) is problem]
            rank_zero_warn(f"{' and '.join(names)} will probably not be written: {problem}")

    def _weights(self, session: Session) -> AbstractContextManager[None]:
        """The weights to export."""
        if self.best is None:
            return nullcontext()
        if self.best.value is None:
            rank_zero_warn(
                "export='best', but no validation measured the metric after compression was done: the files hold the "
                "last weights; let pruning end and quantization begin earlier, or validate more often"
            )
            return nullcontext()
        return self.best.loaded(session.module)

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
        state = {"dense": self._dense, "dense_sizes": self._dense_sizes, "logged": self.accuracy.logged}
        return state if self.best is None else {**state, "best": self.best.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        self._dense = dict(state.get("dense", {}))
        self._dense_sizes = dict(state.get("dense_sizes", {}))
        self.accuracy.load(state.get("logged", {}))
        if self.best is not None:
            self.best.load(state.get("best", {}))


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
