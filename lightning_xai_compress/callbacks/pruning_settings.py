"""Settings of the stage that prunes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_xai_compress.callbacks.clock import Moment, check_moment
from lightning_xai_compress.checks import check_number
from lightning_xai_compress.pruning import SCHEDULES, Choice, Normalization, Schedule, Scope

__all__ = ["Pruning"]


@dataclass(frozen=True)
class Pruning:
    """How patiently to prune, and what stays.

    Args:
        steps: Number of pruning steps over the ramp, >= 1, each followed by training. Many small steps let the
            non-positive set refill. Without meaning for "one_shot" and "stepwise".
        schedule: "cubic": fast first, then slower; "linear": as much at every step; "one_shot": all where the ramp
            begins; "stepwise": at `milestones`.
        milestones: For "stepwise": pairs of a moment within the ramp (epochs, a share, or a text such as "1500 steps")
            and the sparsity from then on, rising, such as [(2, 0.5), (4, 0.8)]. The last one is the final sparsity;
            where none is given, they say in what proportion it is approached.
        rescore_every: Every n-th pruning step, beginning with the first, scores anew; those between go by the latest
            scores, which are kept, in checkpoints, too.
        scope: "global": one ranking over all layers; "layer": the same sparsity in every layer.
        floor: Share of each layer's weights that stays at least, in [0, 1). Whatever it is, every layer keeps a weight,
            and every output of the last layer its best one.
        confidence: For "nonpositive": one-sided, in [0.5, 1): only weights whose relevance is that surely <= 0 belong
            to the set. Needs Scoring(statistics=("rms", "standard_error")).
        normalization: "lamp": rank by score^2 over the sum of all score^2 of the layer that are not smaller (Lee et
            al. 2021, eq. 1); None: by the score.
        protect: Shell-style patterns of layers that are never pruned, but quantized; they count in the sparsity.
        protect_ends: Whether the first and the last layer are protected, in the order in which a batch meets them.
        fresh_batchnorm: Whether BatchNorm statistics are estimated anew for each scoring, since those of training lag
            behind the pruned weights for some dozens of batches. Costs 4,096 samples forward.

    Raises:
        ValueError: A setting out of range.
    """

    steps: int = 24
    schedule: Schedule = "cubic"
    milestones: Sequence[tuple[Moment, float]] = ()
    rescore_every: int = 1
    scope: Scope = "global"
    floor: float = 0.0
    confidence: float | None = None
    normalization: Normalization | None = None
    protect: Sequence[str] = ()
    protect_ends: bool = False
    fresh_batchnorm: bool = False

    def __post_init__(self) -> None:
        for name, count in (("pruning steps", self.steps), ("rescore_every", self.rescore_every)):
            if check_number(name, count, whole=True) < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if (self.schedule == "stepwise") != bool(self.milestones):
            raise ValueError(
                "milestones and schedule='stepwise' go together, such as milestones=[(2, 0.5), (4, 0.8)]: got "
                f"schedule={self.schedule!r} and milestones={self.milestones!r}"
            )
        self._check_milestones()
        for name in ("protect_ends", "fresh_batchnorm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self.choice()
        # a YAML config gives lists: settings that say the same are equal
        object.__setattr__(self, "milestones", tuple((moment, sparsity) for moment, sparsity in self.milestones))
        object.__setattr__(self, "protect", tuple(self.protect))

    def _check_milestones(self) -> None:
        pairs = self.milestones
        if not isinstance(pairs, list | tuple) or any(
            not isinstance(each, list | tuple) or len(each) != 2 for each in pairs
        ):
            raise ValueError(f"milestones must be pairs of a moment and a sparsity, got {pairs!r}")
        for moment, sparsity in pairs:
            check_moment("milestone", moment)
            if not 0 < check_number("sparsity of a milestone", sparsity) < 1:
                raise ValueError(f"sparsity of a milestone must lie in (0, 1), got {sparsity}")
        if any(later <= earlier for earlier, later in pairwise(self.levels)):
            raise ValueError(f"the sparsity of milestones must rise, got {self.levels}")

    @property
    def levels(self) -> tuple[float, ...]:
        """Sparsities of the milestones."""
        return tuple(sparsity for _, sparsity in self.milestones)

    def choice(self) -> Choice:
        """What `select_mask` takes of these; what stays in a certain model is for the stage to add."""
        return Choice(
            scope=self.scope,
            floor=self.floor,
            confidence=self.confidence,
            normalization=self.normalization,
            protect=self.protect,
        )
