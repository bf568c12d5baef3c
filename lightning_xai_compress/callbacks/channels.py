"""The stage that removes whole channels: masked during the fit, gone in the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_xai_compress.callbacks.base import CompressionCallback
from lightning_xai_compress.callbacks.clock import Moment, check_moment
from lightning_xai_compress.callbacks.inputs import example_inputs
from lightning_xai_compress.callbacks.precision import MixedPrecision
from lightning_xai_compress.callbacks.session import Session
from lightning_xai_compress.callbacks.stage import Stage
from lightning_xai_compress.checks import check_names, check_number
from lightning_xai_compress.errors import CompressionError
from lightning_xai_compress.formats import Inputs, structure_text
from lightning_xai_compress.plan import Mask, ScoreMap, Skipped
from lightning_xai_compress.pruning import matching
from lightning_xai_compress.relevance import evaluation, known_names
from lightning_xai_compress.structure import (
    ChannelGroup,
    ChannelScore,
    Cost,
    Kept,
    Measure,
    channel_mask,
    channel_scores,
    check_channel_score,
    find_channels,
    flattened_otherwise,
    kept_entries,
    macs_of,
    select_channels,
    shrunk,
    undisturbed,
    unlike,
)

__all__ = ["ChannelPruning", "Channels"]


@dataclass(frozen=True)
class Channels:
    """How many channels go, and which.

    One of the first three says what is left; by default half of the operations.

    Args:
        macs: Share of the multiply-accumulate operations of a forward pass, in (0, 1), as `torch.utils.flop_counter`
            counts them.
        parameters: Share of the parameters of Linear and convolution layers.
        channels: Share of the channels that could go.
        score: What a channel is worth by the scores of its weights: "sum", "mean" or "rms" over its filter, or
            "output", the relevance of the channel itself.
        multiple: Of which the channels that stay are one: kernels are fast at round numbers.
        floor: Share of each group's channels that stays at least, in [0, 1).
        steps: Number of steps over the ramp, >= 1, each scored anew and followed by training.
        protect: Shell-style patterns of layers whose channels stay.

    Raises:
        ValueError: A setting out of range, or more than one target.
    """

    macs: float | None = None
    parameters: float | None = None
    channels: float | None = None
    score: ChannelScore = "sum"
    multiple: int = 8
    floor: float = 0.1
    steps: int = 8
    protect: Sequence[str] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("macs", "parameters", "channels") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"Channels takes one target, got {' and '.join(given)}")
        for name in given:
            if not 0 < check_number(name, getattr(self, name)) < 1:
                raise ValueError(f"{name}, the share that is left, must lie in (0, 1), got {getattr(self, name)}")
        check_channel_score(self.score)
        for name in ("multiple", "steps"):
            if check_number(name, getattr(self, name), whole=True) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= check_number("floor", self.floor) < 1:
            raise ValueError(f"floor, a share of each group's channels, must lie in [0, 1), got {self.floor}")
        object.__setattr__(self, "protect", check_names("protect", self.protect))

    @property
    def measure(self) -> Measure:
        """What the target is a share of."""
        return "parameters" if self.parameters is not None else "channels" if self.channels is not None else "macs"

    @property
    def share(self) -> float:
        """The target."""
        found = getattr(self, self.measure)
        return 0.5 if found is None else float(found)


class ChannelPruning(CompressionCallback, Stage):
    """Prune whole channels by the relevance of their weights: neurons, filters, and all that is coupled to them.

    During the fit their weights are zero, and those that use them, so that optimizers, checkpoints and processes see
    the model they know. The files hold the smaller module. Which channels are coupled is what Torch-Pruning's
    dependency graph says (Fang et al. 2023); before training the smaller module is tried on a batch.

    Args:
        channels: How many, and which.
        start: When the ramp begins: epochs (whole number), a share of the fit, or steps ("1500 steps").
        end: When it is done.
        exclude: Shell-style patterns of layers to leave alone.

    Attributes:
        removed: Boolean tensors of shape [channels] by name of the weight that makes them, True for what is gone.

    Raises:
        ValueError: A setting out of range; (in fit) a target that cannot be met.
        ImportError: The extra `structured` is not installed.
        CompressionError: (in fit, before training) a model without channels that can go.
    """

    rank: ClassVar[int] = 1
    needs_scores: ClassVar[bool] = True

    def __init__(
        self,
        channels: Channels | None = None,
        *,
        start: Moment = 0.25,
        end: Moment = 0.6,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if channels is not None and not isinstance(channels, Channels):
            raise ValueError(f"channels must be Channels(...), got {channels!r}")
        self.channels = channels or Channels()
        self.start = check_moment("start of channel pruning", start)
        self.end = check_moment("end of channel pruning", end)
        self.exclude = check_names("exclude", exclude)
        self.removed: dict[str, Tensor] = {}
        self._groups: list[ChannelGroup] = []
        self._prices: dict[str, float] = {}
        self._rest = 0.0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._positions: list[int] = []
        self._done = 0

    def stages(self) -> list[Stage]:
        """This one."""
        return [self]

    def begin(self, session: Session) -> None:
        """Find the groups, try the smaller module, and see that the target can be met."""
        clock = session.clock
        first = clock.check("start of channel pruning", self.start)
        last = clock.check("end of channel pruning", self.end, last=True)
        if last < first:
            raise ValueError(f"channel pruning ends (at {self.end}) before it starts (at {self.start})")
        steps = self.channels.steps
        self._positions = [first + (last - first) * step // steps for step in range(steps)]
        precision = session.stage(MixedPrecision)
        if precision is not None and precision.quantization.bits_per == "group":
            raise ValueError(
                "bits_per='group' cuts input channels into groups of one size, which would not be whole any more once "
                "channels go: use bits_per='channel' or 'layer' with structure='channel'"
            )
        if precision is not None and precision.quantization.codebook_channels is not None:
            raise ValueError(
                "codebook_channels gives every block of output channels a codebook, and blocks would not be whole any "
                "more once channels go: leave it out with structure='channel', so that a layer has one"
            )
        example = example_inputs(session, ("structure='channel'",))[0]
        self._shapes = {name: tuple(weight.shape) for name, weight in session.latent.parameters.items()}
        with torch.inference_mode(False), evaluation(session.module), undisturbed(session.module):
            self._groups, staying = self._usable(session, example)
            self._measure(session, example)
        session.skipped += [entry for entry in staying if entry not in session.skipped]
        unknown = sorted(self.removed.keys() - {group.name for group in self._groups})
        if unknown:
            raise CompressionError(f"the checkpoint removed channels of {unknown[:4]}, which this model does not have")
        self._check({group.name: torch.zeros(len(group)) for group in self._groups}, staying)

    def _check(self, scores: Mapping[str, Tensor], staying: Sequence[Skipped]) -> None:
        """See that the target can be met."""
        cost = self._cost()
        select_channels(self._groups, scores, cost, 0.0, multiple=self.channels.multiple, floor=self.channels.floor)
        if cost.share > self.channels.share:
            raise ValueError(
                f"{self.channels.measure}={self.channels.share} cannot be met: with floor={self.channels.floor} and "
                f"multiple={self.channels.multiple} at least {cost.share:.3f} is left; lower those, protect fewer "
                f"layers, or ask for less{_listed(staying)}"
            )

    def _usable(self, session: Session, example: Inputs) -> tuple[list[ChannelGroup], list[Skipped]]:
        """The groups that may go and that the smaller module is right without; and what stays, with the reason."""
        module, names = session.module, known_names(session.module, session.latent.parameters)
        groups, skipped = find_channels(module, example.args, example.kwargs or {}, names)
        protected = matching(names, self.channels.protect)
        kept = [each for each in groups if not protected & {part.name for part in each.makers}]
        skipped += [Skipped(each.name, "its channels are protected") for each in groups if each not in kept]
        skipped += [Skipped(each.name, "its channels stay: there is but one") for each in kept if len(each) < 2]
        kept = [each for each in kept if len(each) > 1]
        draw = torch.Generator().manual_seed(0)  # scattered, so that no order of channels looks like another
        trial = {
            each.name: torch.randperm(len(each), generator=draw) < min(self.channels.multiple, len(each) // 2)
            for each in kept
        }

        def wrong(*tried: ChannelGroup) -> str:
            return unlike(module, tried, trial, example.args, example.kwargs or {})

        if wrong(*kept):
            suspects, kept = kept, []
            for each in suspects:
                reason = wrong(each)
                right = (
                    next((other for other in flattened_otherwise(each) if not wrong(other)), None) if reason else each
                )
                if right is None:
                    skipped.append(Skipped(each.name, f"its channels stay: {reason}"))
                else:
                    kept.append(right)
        if not kept:
            raise CompressionError(
                f"{type(module).__name__} has no channels that can go: leave structure out, or exclude less"
                f"{_listed(skipped) or ' (no output that depends on its weights was found)'}"
            )
        rank_zero_info(f"[compression] channels can go in {len(kept)} groups of {sum(map(len, kept)):,}")
        return kept, skipped

    def _measure(self, session: Session, example: Inputs) -> None:
        """What an entry of each weight costs."""
        weights = session.latent.parameters
        if self.channels.measure == "channels":
            self._prices = {each.name: 1.0 for each in self._groups}
        elif self.channels.measure == "parameters":
            self._prices = dict.fromkeys(weights, 1.0)
        else:
            counted, self._rest = macs_of(
                session.module, lambda: session.module(*example.args, **(example.kwargs or {}))
            )
            self._prices = {name: count / weights[name].numel() for name, count in counted.items() if name in weights}
            self._rest += sum(count for name, count in counted.items() if name not in weights)

    def _cost(self) -> Cost:
        if self.channels.measure == "channels":
            counted = [
                ChannelGroup(each.name, (replace(each.makers[0], name=each.name, axis=0),)) for each in self._groups
            ]
            return Cost(counted, {each.name: [each.makers[0].index.numel()] for each in self._groups}, self._prices)
        return Cost(self._groups, self._shapes, self._prices, self._rest)

    def check_scores(self, scores: ScoreMap) -> None:
        """Only channels of known relevance can go: they must be enough."""
        found = channel_scores(self._groups, scores, self.channels.score)
        unknown = [name for name, each in found.items() if bool(each.isnan().all())]
        staying = [Skipped(name, "its channels stay: their relevance is unknown") for name in unknown]
        self._check({name: torch.where(each.isnan(), each, 0.0) for name, each in found.items()}, staying)

    def phases(self) -> list[tuple[int, str]]:
        """The steps of the ramp."""
        return [(position, "pruning channels") for position in self._positions]

    @property
    def complete(self) -> bool:
        """Whether the last step is taken."""
        return self._done >= len(self._positions)

    def advance(self, session: Session, batch: int) -> None:
        """Take the latest step that is due; several at once are one."""
        due = sum(position <= batch for position in self._positions)
        if self.complete or due <= self._done or session.stopped():
            return
        session.start(batch)
        scores = session.rescore(batch)
        if scores is None:
            return
        self._done = due
        share = 1 - (1 - self.channels.share) * due / len(self._positions)
        cost = self._cost()
        self.removed = select_channels(
            self._groups,
            channel_scores(self._groups, scores, self.channels.score),
            cost,
            share,
            previous=self.removed,
            multiple=self.channels.multiple,
            floor=self.channels.floor,
        )
        mask = channel_mask(self._groups, self.removed, session.latent.parameters)
        previous = session.latent.mask()
        session.latent.apply_mask(Mask({name: keep & previous[name] for name, keep in mask.keep.items()}))
        gone, total = sum(int(each.sum()) for each in self.removed.values()), sum(map(len, self._groups))
        session.record(
            "channels removed",
            batch,
            f"{gone:,} of {total:,} channels are gone, {cost.share:.1%} of the {self.channels.measure} are left",
            channels=gone,
            left=cost.share,
        )

    @property
    def provenance(self) -> dict[str, str]:
        """Readers know by it that layers may be smaller than a new model's, and of what sizes that one is."""
        kept = kept_entries(self._groups, self.removed, self._shapes)
        return structure_text({name: self._shapes[name] for name in kept}) if kept else {}

    def smaller(self, module: nn.Module) -> AbstractContextManager[Kept] | None:
        """Within it the module is without the channels that are gone; None while there are none."""
        if not any(bool(each.any()) for each in self.removed.values()):
            return None
        return shrunk(module, self._groups, self.removed)

    def state(self) -> dict[str, Any]:
        """Steps taken, and what is gone."""
        return {"done": self._done, "removed": dict(self.removed)}

    def load(self, state: dict[str, Any]) -> None:
        """Take up or begin."""
        self._done = state.get("done", 0)
        self.removed = {name: each.cpu() for name, each in state.get("removed", {}).items()}


def _listed(staying: Sequence[Skipped]) -> str:
    """What stays, with the reasons, as the end of a message."""
    reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in staying[:4])
    return f" ({reasons})" if reasons else ""
