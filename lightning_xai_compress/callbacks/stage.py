"""What a stage is: the interface between the stage callbacks and the session of a fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import Trainer
from torch import Tensor, nn
from zennit.core import Composite

from lightning_xai_compress.checks import check_number
from lightning_xai_compress.plan import ScoreMap
from lightning_xai_compress.relevance import (
    AttentionRule,
    BaselineName,
    Explain,
    Statistic,
    check_attention,
    check_baseline,
    check_composite,
    check_explain,
    check_statistics,
)
from lightning_xai_compress.structure import Kept

if TYPE_CHECKING:
    from lightning_xai_compress.callbacks.session import Session

__all__ = ["Planned", "Scoring", "Stage"]


@dataclass(frozen=True)
class Scoring:
    """How weights are scored; `score` says more about each.

    Args:
        explain: Start relevance: "margin" (true class against the others), "logit" (true class) or "predicted".
        composite: Rules of LRP: a name such as "epsilon" or "epsilon_plus", or a zennit Composite.
        attention: "attnlrp", or "cp", which leaves the projections of queries and keys unknown, and so unpruned.
        statistics: What to collect beside the signed mean; "rms" is what the score is made of.
        epsilon: Stabiliser of plain LRP-epsilon, >= 0.
        baseline: What DeepLIFT compares an input with: a number, "mean" (of the samples of the pass), "blurred", or a
            tensor in the shape of a sample.
        samples: Training samples a pass, in whole batches, >= 1. Fewer than some hundred make the signs a lottery.
        seed: Decides which samples, and the criterion "random".
    """

    explain: Explain = "margin"
    composite: str | Composite = "epsilon"
    attention: AttentionRule = "attnlrp"
    statistics: Sequence[Statistic] = ("rms",)
    epsilon: float = 1e-6
    baseline: float | BaselineName | Tensor = 0.0
    samples: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        check_explain(self.explain)
        check_composite(self.composite)
        check_attention(self.attention)
        check_statistics(self.statistics)
        check_number("epsilon", self.epsilon)
        check_baseline(self.baseline)
        check_number("samples", self.samples, whole=True)
        check_number("seed", self.seed, whole=True)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed}")
        if self.epsilon < 0:
            raise ValueError(f"epsilon must be >= 0, got {self.epsilon}")
        if self.samples < 1:
            raise ValueError(f"samples must be >= 1, got {self.samples}")


@dataclass(frozen=True)
class Planned:
    """A point of the schedule.

    Args:
        sparsity: Share of zeros; None where the stage has no say.
        bits: Mean width; None where the stage has no say, or weights are not quantized yet.
        open: Whether the sparsity is a guess, since the non-positive set decides.
        budget: What decides both, in words; the numbers are then guesses.
    """

    sparsity: float | None = None
    bits: float | None = None
    open: bool = False
    budget: str = ""


class Stage(ABC):
    """One step of the work: called by the session at every batch, in the order of `rank`."""

    rank: ClassVar[int]
    needs_scores: ClassVar[bool] = False
    is_budget: ClassVar[bool] = False
    exclude: tuple[str, ...] = ()

    def check_settings(self, trainer: Trainer) -> None:  # noqa: B027
        """Refuse settings that can be seen to be wrong without layers and data."""

    def begin(self, session: Session) -> None:  # noqa: B027
        """Refuse, before the first batch, what does not fit this model, its data or the length of the fit."""

    def check_scores(self, scores: ScoreMap) -> None:  # noqa: B027
        """Refuse, before the first batch, what cannot be met with the layers whose relevance is known."""

    def tried(self, names: frozenset[str]) -> None:  # noqa: B027
        """The trial validation before training logged metrics of these names."""

    def phases(self) -> list[tuple[int, str]]:
        """Batches at which something happens, each with the phase that it belongs to, for the schedule."""
        return []

    def planned(self, batch: int) -> Planned:
        """What will hold from a batch on, as far as this stage decides it."""
        return Planned()

    def before_compression(self, session: Session, batch: int) -> None:  # noqa: B027
        """The weights are about to be changed for the first time."""

    @property
    def complete(self) -> bool:
        """Whether all that the stage planned has been done."""
        return True

    @abstractmethod
    def advance(self, session: Session, batch: int) -> None:
        """Do what is due at a batch, counted from the start of the fit."""

    @property
    def metric_key(self) -> str:
        """Under which the metric of the compressed model is found in `trainer.callback_metrics`; "" for none."""
        return ""

    @property
    def provenance(self) -> dict[str, str]:
        """What files should say about the stage's part in the model."""
        return {}

    def before_validation(self, session: Session) -> None:  # noqa: B027
        """A validation of this fit begins."""

    def after_validation(self, session: Session) -> None:  # noqa: B027
        """A validation of this fit is over; its metrics are in `trainer.callback_metrics`."""

    def measured(self, session: Session, value: float | None) -> None:  # noqa: B027
        """A validation is over, and this is what it measured; None where the metric is unknown."""

    def after_batch(self, session: Session) -> None:  # noqa: B027
        """A training batch and its step, if it had one, are over."""

    def after_epoch(self, session: Session) -> None:  # noqa: B027
        """An epoch of training, and its validation, are over."""

    def finish(self, session: Session) -> None:  # noqa: B027
        """The last batch and the last validation are over."""

    def smaller(self, module: nn.Module) -> AbstractContextManager[Kept] | None:
        """Within it the module is as small as files hold it; None where the stage takes nothing out."""
        return None

    def float_activations(self) -> AbstractContextManager[None]:
        """Within it the model computes with float activations: for scoring."""
        return nullcontext()

    def failed(self) -> None:  # noqa: B027
        """The fit has raised an error, perhaps before anything of it ran in this process."""

    def close(self) -> None:  # noqa: B027
        """The fit is over, perhaps by an error: take back what was attached to the model; may be called twice."""

    def state(self) -> dict[str, Any]:
        """What the stage must remember to continue: plain types."""
        return {}

    def load(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take up `state`; an empty one means a fresh start."""
