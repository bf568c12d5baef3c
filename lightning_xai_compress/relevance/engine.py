"""Per-weight relevance (or another gradient-based share) of any model in one forward and backward pass a batch.

LRP passes relevance R back from an output. Written as c = R / activation, LRP-epsilon of a linear map
z = w x + b (Bach et al. 2015, eq. 58; Montavon et al. 2019, sec. 10.2.2) becomes c_z <- c_z |z| / (|z| + epsilon)
followed by the ordinary backward pass: R_x = x c_x, and the share of one weight is R_w = w times the weight gradient.
`interception` says what every other operation does. All of it is an ordinary `torch.autograd.grad` over detached
parameters, so that nothing of the model is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from zennit.core import Composite

from lightning_xai_compress.errors import CompressionError, NonFiniteError, RelevanceError
from lightning_xai_compress.plan import HeatMaps
from lightning_xai_compress.relevance.attention import AttentionRule, check_attention
from lightning_xai_compress.relevance.baselines import Baseline, check_baseline, mean_inputs, references
from lightning_xai_compress.relevance.composites import read_composite
from lightning_xai_compress.relevance.deeplift import DeepLift, Recording
from lightning_xai_compress.relevance.explain import Explain, Explained, check_explain, input_tensors
from lightning_xai_compress.relevance.heatmaps import heat_maps
from lightning_xai_compress.relevance.interception import Interception, Settings
from lightning_xai_compress.relevance.isolation import Isolated, isolated
from lightning_xai_compress.relevance.lrp import LRP
from lightning_xai_compress.relevance.propagation import depends_on
from lightning_xai_compress.relevance.statistics import RelevanceSums, Statistic

__all__ = ["Propagation", "relevance_sums"]

Propagation = Literal["lrp", "deeplift", "gradient"]


def relevance_sums(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str],
    propagation: Propagation = "lrp",
    composite: str | Composite = "epsilon",
    explain: Explain = "margin",
    epsilon: float = 1e-6,
    attention: AttentionRule = "attnlrp",
    baseline: Baseline = 0.0,
    statistics: Iterable[Statistic] = ("rms",),
    by_sample: bool = False,
    heatmaps: int = 0,
    on_batch: Callable[[], None] | None = None,
) -> tuple[RelevanceSums, HeatMaps | None]:
    """Pass relevance back through every batch and add up what reaches each weight.

    Args:
        model: Any module.
        batches: On the model's device.
        layers: Parameter names to score.
        propagation: "lrp"; "deeplift"; or "gradient", the ordinary one.
        composite: Rules for "lrp".
        explain: See `explained_tensor`.
        epsilon: Stabiliser of LRP-epsilon, >= 0.
        attention: "attnlrp" or "cp", see `attention.attend`.
        baseline: What "deeplift" compares with, see `score`.
        statistics: See `RelevanceSums`.
        by_sample: See `RelevanceSums`.
        heatmaps: Number of samples whose input relevance is kept, too.
        on_batch: Called after each batch.

    Raises:
        ValueError: A setting out of range.
        RelevanceError: A rule or batch that is not understood, or an explained tensor that depends on no layer or
            input.
        NonFiniteError: Values that are not finite; names layer or batch.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be >= 0, got {epsilon}")
    check_attention(attention)
    check_explain(explain)
    if heatmaps < 0:
        raise ValueError(f"heatmaps must be >= 0, got {heatmaps}")
    check_baseline(baseline)
    if propagation == "deeplift" and isinstance(baseline, str) and baseline == "mean":
        if isinstance(batches, Iterator):
            raise RelevanceError(
                "baseline='mean' goes through the batches twice, but an iterator gives them once: pass a list or a "
                "DataLoader, or the mean itself as a tensor"
            )
        baseline = mean_inputs(batches)
    rules = read_composite(composite, model) if propagation == "lrp" else {}
    with isolated(model, layers) as copy:
        sums = RelevanceSums({name: copy.leaves[name].detach() for name in layers}, statistics, by_sample=by_sample)
        if propagation == "deeplift":
            mode: Interception = DeepLift(copy.leaves, sums)
        elif propagation == "lrp":
            mode = LRP(copy.leaves, sums, Settings(epsilon, rules, attention))
        else:
            mode = Interception(copy.leaves, sums)
        run = _Pass(copy, mode, layers, explain, baseline)
        maps: HeatMaps | None = None
        for index, batch in enumerate(batches):
            wanted = heatmaps - (0 if maps is None else len(maps.relevance))
            found = run.batch(index, batch, heatmaps=wanted)
            maps = found if maps is None else maps.joined(found)
            if on_batch is not None:
                on_batch()
        run.finish()
    return sums, maps


class _Pass:
    """One pass over all batches, see `relevance_sums`."""

    def __init__(
        self, copy: Isolated, mode: Interception, layers: Sequence[str], explain: Explain, baseline: Baseline
    ) -> None:
        self.copy = copy
        self.mode = mode
        self.layers = layers
        self.explain = explain
        self.baseline = baseline
        self.track = True

    def batch(self, index: int, batch: Any, *, heatmaps: int) -> HeatMaps | None:
        """Pass the relevance of one batch back and add it up."""
        self.copy.check_device(batch, index)
        reference = self._record(index, batch) if isinstance(self.mode, DeepLift) else []
        self.mode.draws = heatmaps > 0
        explained, inputs = self._forward(index, batch, track=self.track)
        self._check(index, batch, explained)
        if index == 0 and inputs:
            self._check_dependence(batch, explained, inputs)
        self.mode.end_forward()
        at = [self.copy.leaves[name] for name in self.layers]
        sums, total = self.mode.sums, explained.tensor.sum()
        counts = explained.samples, explained.left_out
        if not (heatmaps > 0 or isinstance(self.mode, DeepLift) or sums.collects("between")):
            del explained
            torch.autograd.backward(total, inputs=at)  # adds up in the leaves, with no tensor for the batch alone
            sums.end_batch(dict.fromkeys(self.layers), *counts)
            self.mode.end_batch()
            return None
        if heatmaps > 0:
            inputs = inputs[:1] or ([] if self.mode.tokens is None else [self.mode.tokens])
            at += inputs
            self.mode.inputs = inputs
        gradients = torch.autograd.grad(total, at, allow_unused=True)
        found = None
        if heatmaps > 0 and inputs and gradients[-1] is not None:
            found = heat_maps(self.mode, inputs[0], gradients[-1], reference, heatmaps)
        shares: Sequence[Tensor | None] = gradients[: len(self.layers)]
        if isinstance(self.mode, DeepLift):  # contributions are of differences, so it adds them up itself
            shares = [None] * len(self.layers)
        sums.end_batch(dict(zip(self.layers, shares, strict=True)), *counts)
        self.mode.end_batch()
        return found

    def finish(self) -> None:
        """Hand over what the leaves added up."""
        for name in self.layers:
            gradient = self.copy.leaves[name].grad
            if gradient is not None:
                self.mode.sums.take(name, gradient)

    def _forward(self, index: int, batch: Any, *, track: bool) -> tuple[Explained, list[Tensor]]:
        prepared, inputs = self.copy.prepare(batch, track=track)
        self.mode.end_batch()
        try:
            with self.mode:
                return self.copy.run(prepared, index, self.explain), inputs
        except CompressionError:
            raise
        except RuntimeError:
            if not track:
                raise
        # some models cannot take an input that needs a gradient, for example where they call .numpy()
        self.track = False
        return self._forward(index, batch, track=False)

    def _record(self, index: int, batch: Any) -> list[Tensor]:
        assert isinstance(self.mode, DeepLift)
        replaced = self.copy.replaced(batch, lambda inputs: references(self.baseline, inputs))
        reference = input_tensors(replaced)
        if not reference:
            raise RelevanceError(
                f"batch {index} has no floating-point input: DeepLIFT compares with a baseline, and tokens have none"
            )
        recording = Recording()
        with torch.no_grad(), recording:
            self.copy.run(replaced, index, self.explain)
        self.mode.start(recording)
        return reference

    def _check(self, index: int, batch: Any, explained: Explained) -> None:
        if not explained.tensor.numel():
            raise RelevanceError(f"batch {index} holds no samples")
        if not explained.tensor.requires_grad:
            raise RelevanceError(
                f"batch {index}: the explained tensor does not depend on any weight "
                "(is it detached, or computed under no_grad?)"
            )
        if torch.isfinite(explained.tensor).all():
            return
        if not all(torch.isfinite(each).all() for each in input_tensors(batch)):
            raise NonFiniteError(f"batch {index}: what is explained is not finite, for the batch itself is not")
        self.mode.diagnose = True
        try:
            self._forward(index, batch, track=False)  # stops at the first layer
        except NonFiniteError as error:
            raise NonFiniteError(f"batch {index}: what is explained is not finite: {error}") from error
        raise NonFiniteError(f"batch {index}: what is explained is not finite")

    def _check_dependence(self, batch: Any, explained: Explained, inputs: list[Tensor]) -> None:
        """An explained tensor that is the same for every input explains nothing."""
        if depends_on(explained.tensor, inputs):
            return

        # the path may be cut on purpose (frozen layers under no_grad): then the values still change
        def moved(x: Tensor) -> Tensor:
            return x + torch.randn_like(x) * (x.std(correction=0) + 1)

        changed = self.copy.replaced(batch, lambda inputs: [moved(x) for x in inputs])
        with torch.no_grad():
            other = self.copy.run(changed, 0, self.explain).tensor
        if other.shape == explained.tensor.shape and torch.equal(other, explained.tensor):
            raise RelevanceError(
                "the explained tensor does not depend on the input: it is the same for another batch. Is it "
                "computed from parameters alone, or from a constant? (see relevance_step)"
            )
