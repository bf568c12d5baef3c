"""Criteria behind one interface: from a name, or a function of the user's, to a `ScoreMap`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from zennit.core import Composite

from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.layers import find_scorable
from lightning_xai_compress.plan import ScoreMap, Skipped, unknown_rows
from lightning_xai_compress.ranking import lamp
from lightning_xai_compress.relevance import (
    AttentionRule,
    Baseline,
    Explain,
    Processes,
    Statistic,
    check_composite,
    check_explain,
    check_statistics,
    input_norms,
    isolated,
    relevance_sums,
    unwrapped,
)

__all__ = ["CRITERIA", "SUMMED", "Criterion", "CriterionName", "check_criterion", "criterion_name", "score"]

CriterionName = Literal["lrp", "deeplift", "taylor", "fisher", "wanda", "magnitude", "lamp", "random"]
CRITERIA: tuple[str, ...] = get_args(CriterionName)
SUMMED = ("lrp", "deeplift", "taylor", "fisher", "wanda")  # add up over samples, so that processes can share them
Criterion = Callable[[nn.Module, Iterable[Any], Sequence[str]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class _Request:
    """All that a criterion may need to know."""

    model: nn.Module
    batches: Iterable[Any]
    layers: tuple[str, ...]
    composite: str | Composite
    explain: Explain
    statistics: tuple[Statistic, ...]
    epsilon: float
    attention: AttentionRule
    baseline: Baseline
    heatmaps: int
    seed: int
    processes: Processes | None
    on_batch: Callable[[], None] | None


def score(
    model: nn.Module,
    batches: Iterable[Any] = (),
    criterion: str | Criterion = "lrp",
    *,
    composite: str | Composite = "epsilon",
    explain: Explain = "margin",
    statistics: Sequence[Statistic] = ("rms",),
    epsilon: float = 1e-6,
    attention: AttentionRule = "attnlrp",
    baseline: Baseline = 0.0,
    layers: Sequence[str] | None = None,
    heatmaps: int = 0,
    seed: int = 0,
    processes: Processes | None = None,
    on_batch: Callable[[], None] | None = None,
) -> ScoreMap:
    """Score every weight, by its relevance for the model's decisions or by another criterion.

    Runs in evaluation mode and float32 with autocast off, whatever the caller's context, and leaves parameters,
    gradients, buffers, training flags and random state as they were. A module wrapped by `torch.compile` is scored
    under the names of the original one.

    Relevance is summed over positions and averaged over samples. For "lrp" and "deeplift" the ranking score is
    Q |w'|, where Q is the root of the mean over samples of the sum of r^2 over positions (without "rms", the best
    of the statistics that were collected), and w' the weight with a directly following BatchNorm folded in: rescaling
    a weight in front of a BatchNorm changes nothing, and so must not change its rank.

    | criterion | score | relevance | sensitivity |
    |---|---|---|---|
    | "lrp" | Q abs(w') | Layer-wise Relevance Propagation | mean (r / w)^2 |
    | "deeplift" | Q abs(w') | share of f(x) - f(baseline), rescale rule (Shrikumar et al. 2017) | as above |
    | "taylor" | abs(mean g w) | gradient times weight (Molchanov et al. 2019, eq. 8) | mean g^2 |
    | "fisher" | mean g^2 w^2, g of one sample | gradient times weight | mean g^2 |
    | "wanda" | abs(w) norm of its input (Sun et al. 2024, eq. 1) | no sign | mean x^2 |
    | "magnitude" | abs(w) | no sign | 1 |
    | "lamp" | w^2 over the sum of all larger w^2 in its layer (Lee et al. 2021, eq. 1) | no sign | 1 |
    | "random" | uniform in [0, 1) | no sign | 1 |

    Args:
        model: Any module; its `relevance_step(batch, batch_idx)`, where it has one, says what is explained.
        batches: Batches on the model's device, `(input, target)` or what `split_batch` understands. "magnitude", "lamp"
            and "random" need none.
        criterion: A name above; or a function `(model, batches, layers)` that returns scores >= 0 by parameter name
            (or a `ScoreMap`); or the import path of one, such as "mypackage.criteria.mine".
        composite: For "lrp": "epsilon" on the model as it is, "zplus", "gamma", "alpha_beta" on all layers,
            "epsilon_plus", "epsilon_alpha2_beta1" (and "..._flat"), or a zennit Composite, with BatchNorm merged.
        explain: "margin" (true class against the others), "logit" (true class) or "predicted" (predicted class).
        statistics: Any of "rms", "absolute", "positive", "standard_error" (needs eight batches) to collect beside the
            signed mean; the first three cost one more weight gradient a pass, "absolute" and "positive" one together.
        epsilon: Stabiliser of plain LRP-epsilon, >= 0.
        attention: "attnlrp" (Achtibat et al. 2024) or "cp" (Ali et al. 2022): in the latter, attention weights are
            constants, and the projections of queries and keys are unknown.
        baseline: For "deeplift", what the input is compared with: a number; a tensor, broadcast to the input, or one
            for each floating-point input; "mean", the mean over all samples of the batches, which are gone through
            twice; or "blurred", the input under a Gaussian of a tenth of its height and width.
        layers: Parameter names to score; all that `find_scorable` finds by default.
        heatmaps: Number of samples whose input relevance is kept, too ("lrp", "deeplift", "taylor", "fisher").
        seed: For "random".
        processes: For criteria of `SUMMED`: others that score the same model by batches of their own, or by none. The
            scores are then those of all batches, on each of them.
        on_batch: Called after each batch, for a progress bar.

    Returns:
        Scores in float32 (float64 for a float64 model). A weight that relevance does not reach is unknown, NaN.

    Raises:
        ValueError: A setting out of range.
        RelevanceError: No samples, a rule or batch that is not understood, or an explained tensor that depends on no
            layer or input.
        NonFiniteError: Values that are not finite; names layer or batch.
    """
    check_criterion(criterion)
    check_composite(composite)
    check_explain(explain)
    model = unwrapped(model)
    found = find_scorable(model)
    if layers is None:
        layers = found.names
    _check_layers(model, layers, found.names)
    request = _Request(
        model, batches, tuple(layers), composite, explain, check_statistics(statistics), epsilon, attention, baseline,
        heatmaps, seed, processes, on_batch,
    )  # fmt: skip
    if callable(criterion) or "." in criterion:
        return _of_user(criterion, request, found.skipped)
    if criterion in ("lrp", "deeplift", "taylor", "fisher"):
        return _propagated(criterion, request, found.skipped)
    if criterion == "wanda":
        norms, samples = input_norms(
            model, batches, layers=request.layers, explain=explain, processes=processes, on_batch=on_batch
        )
        weights = _weights(request)
        scores = {name: weight.abs() * norms[name].sqrt() for name, weight in weights.items()}
        return ScoreMap(scores, scores, norms, samples, signed=False, skipped=(*found.skipped, *unknown_rows(scores)))
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, weight in _weights(request).items():
        if criterion == "magnitude":
            scores[name] = weight.abs()
        elif criterion == "lamp":
            scores[name] = lamp(weight)
        else:
            scores[name] = torch.rand(weight.shape, generator=generator).to(weight)
    return _unsigned(scores, found.skipped)


def criterion_name(criterion: str | Criterion) -> str:
    """What to call a criterion in a message or report."""
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)


def check_criterion(criterion: str | Criterion) -> None:
    """Refuse what is no criterion.

    Raises:
        ValueError: With the names there are.
    """
    if callable(criterion):
        return
    if not isinstance(criterion, str) or (criterion not in CRITERIA and "." not in criterion):
        raise ValueError(
            f"criterion must be one of {', '.join(CRITERIA)}, a function (model, batches, layers) or the import path "
            f"of one, got {criterion!r}"
        )
    if "." in criterion:
        _imported(criterion)


def _propagated(criterion: str, request: _Request, skipped: tuple[Skipped, ...]) -> ScoreMap:
    processes = request.processes
    with nullcontext() if processes is None else processes.together():
        sums, maps = relevance_sums(
            request.model,
            request.batches,
            layers=request.layers,
            propagation="lrp" if criterion == "lrp" else "deeplift" if criterion == "deeplift" else "gradient",
            composite=request.composite,
            explain=request.explain,
            epsilon=request.epsilon,
            attention=request.attention,
            baseline=request.baseline,
            # the Fisher information is the mean of squares, asked for or not
            statistics=("rms", *request.statistics) if criterion == "fisher" else request.statistics,
            by_sample=criterion == "fisher",
            heatmaps=request.heatmaps,
            on_batch=request.on_batch,
        )
    if processes is not None:
        sums.reduce(processes.total)
    scores = sums.score_map(skipped, maps)
    if criterion == "taylor":
        return replace(scores, score={name: each.abs() for name, each in scores.relevance.items()})
    if criterion == "fisher":
        weights = _weights(request)
        return replace(scores, score={name: each * weights[name].square() for name, each in scores.sensitivity.items()})
    return scores


def _of_user(criterion: str | Criterion, request: _Request, skipped: tuple[Skipped, ...]) -> ScoreMap:
    function = _imported(criterion) if isinstance(criterion, str) else criterion
    label = criterion_name(function)
    result = function(request.model, request.batches, request.layers)
    if isinstance(result, ScoreMap):
        weights = _weights(request)

        def beside(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: each.to(weights[name]) if name in weights else each for name, each in tensors.items()}

        return replace(
            result,
            score=beside(result.score),
            relevance=beside(result.relevance),
            sensitivity=beside(result.sensitivity),
        )
    if not isinstance(result, Mapping):
        raise RelevanceError(f"criterion {label} returned a {type(result).__name__}: expected scores by parameter name")
    unknown = sorted(set(result) - set(request.layers))
    if unknown:
        raise RelevanceError(f"criterion {label} scored {unknown[:4]}, which are not among the layers it was given")
    scores = {}
    for name, weight in _weights(request).items():
        each = result.get(name)
        if each is None:
            each = torch.full_like(weight, torch.nan)
        if not isinstance(each, Tensor) or each.shape != weight.shape:
            raise RelevanceError(
                f"criterion {label} gave {name} a score of shape {tuple(getattr(each, 'shape', ()))}, "
                f"expected that of the weight, {tuple(weight.shape)}"
            )
        if bool((each < 0).any()) or bool(torch.isinf(each).any()):
            raise RelevanceError(f"criterion {label} gave {name} scores that are negative or infinite")
        scores[name] = each.detach().to(weight)
    return _unsigned(scores, skipped)


def _unsigned(scores: dict[str, Tensor], skipped: tuple[Skipped, ...]) -> ScoreMap:
    for name, each in scores.items():
        if torch.isinf(each).any():
            raise RelevanceError(f"the score of {name} is not finite: its weights are not, or too large")
    flat = {name: torch.where(each.isnan(), each, 1.0) for name, each in scores.items()}
    return ScoreMap(scores, scores, flat, 0, signed=False, skipped=(*skipped, *unknown_rows(scores)))


def _weights(request: _Request) -> dict[str, Tensor]:
    """The weights to score, float32 at least; masked ones (`torch.nn.utils.prune`) with their mask applied."""
    with isolated(request.model, ()) as copy:
        return {name: copy.leaves[name].detach() for name in request.layers}


def _check_layers(model: nn.Module, layers: Sequence[str], scorable: Sequence[str]) -> None:
    parameters = dict(model.named_parameters())
    missing = [name for name in layers if name not in parameters]
    if missing:
        raise ValueError(f"layers names no parameter: {missing[:4]}; names look like: {', '.join([*parameters][:8])}")
    others = [name for name in layers if name not in scorable]
    if others:
        raise ValueError(
            f"layers names {others[:4]}, which have no relevance of their own: expected weights of Linear, "
            f"convolution, Embedding or attention layers, such as {', '.join(list(scorable)[:4])}"
        )
    if not layers:
        raise RelevanceError(
            f"{type(model).__name__} has no layer to score: expected a Linear, convolution or Embedding"
        )


def _imported(path: str) -> Criterion:
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"criterion {path!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"criterion {path!r} is no function")
    found: Criterion = function
    return found
