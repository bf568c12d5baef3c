"""What must stay, and how layers compare: against a slow twin that removes weight after weight."""

import math
import random

import pytest
import torch

from lightning_xai_compress import Mask, ScoreMap, select_mask
from lightning_xai_compress.pruning import Choice, prunable
from lightning_xai_compress.ranking import lamp

NAN = float("nan")


def score_map(score, relevance=None):
    scores = {name: torch.tensor(values) for name, values in score.items()}
    signs = {name: torch.tensor(values) for name, values in (relevance or score).items()}
    return ScoreMap(scores, signs, scores, samples=1)


def kept(selection):
    return {name: each.int().tolist() for name, each in selection.mask.keep.items()}


def twin(scores, sparsity, rule, previous, choice):
    """Names and places of what is removed, one after the other, by the wording of the rules."""
    weights = [(name, place) for name in sorted(scores.score) for place in range(scores.score[name].numel())]
    score = {weight: float(scores.score[weight[0]].flatten()[weight[1]]) for weight in weights}
    relevance = {weight: float(scores.relevance[weight[0]].flatten()[weight[1]]) for weight in weights}
    gone = {weight for weight in weights if not bool(previous[weight[0]].flatten()[weight[1]])}

    def turn(weight):
        unknown = math.isnan(score[weight])
        late = unknown or (rule == "nonpositive" and not relevance[weight] <= 0)
        return late, unknown, 0 if unknown else score[weight], weight

    there = sorted((weight for weight in weights if weight not in gone), key=turn)
    stays = {weight for weight in there if math.isnan(score[weight]) or weight[0] in choice.protect}
    for name, tensor in scores.score.items():
        own = [weight for weight in there if weight[0] == name]
        last = []
        if name in choice.outputs:
            axis = choice.outputs[name]
            size, rest = tensor.shape[axis], math.prod(tensor.shape[axis + 1 :])
            last = [[w for w in own if w[1] // rest % size == row][-1:] for row in range(size)]
            last = [weight for found in last for weight in found]
        least = max(1, math.ceil(round(choice.floor * tensor.numel(), 6)), len(last))
        for weight in reversed(own):
            if len(last) < least and weight not in last:
                last.append(weight)
        stays |= set(last)
    free = [weight for weight in there if weight not in stays]
    goal = min(round(sparsity * len(weights)), len(weights) - 1)
    while len(gone) < goal and free:
        chosen = free[0]
        if choice.scope == "layer":

            def share(name):
                return (sum(weight[0] == name for weight in gone) + 0.5) / scores.score[name].numel()

            least_pruned = min(sorted({weight[0] for weight in free}), key=share)
            chosen = next(weight for weight in free if weight[0] == least_pruned)
        free.remove(chosen)
        gone.add(chosen)
    return gone


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("rule", ["least", "nonpositive"])
def test_selections_equal_those_of_the_slow_twin(scope, rule):
    draw = random.Random(f"{scope} {rule}")
    shapes = {"a": (4, 3), "b": (2, 5), "c": (3, 2, 2)}
    for _ in range(60):
        # few different values, so that there are ties; some unknown
        score = {name: torch.tensor([draw.choice([0.0, 1.0, 2.0, 3.0, NAN]) for _ in range(math.prod(shape))])
                 .view(shape) for name, shape in shapes.items()}  # fmt: skip
        sign = {name: each * torch.tensor([draw.choice([-1.0, 1.0]) for _ in range(each.numel())]).view(each.shape)
                for name, each in score.items()}  # fmt: skip
        scores = ScoreMap(score, sign, score, samples=1)
        choice = Choice(
            scope=scope,
            floor=draw.choice([0.0, 0.1, 0.4]),
            protect=draw.choice([(), ("a",)]),
            outputs=draw.choice([{}, {"c": 0}, {"c": 1, "b": 0}]),
        )
        previous = Mask({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})
        for sparsity in sorted(draw.choices([0.2, 0.5, 0.7, 0.9, 0.99], k=2)):
            expected = twin(scores, sparsity, rule, previous, choice)
            selection = select_mask(scores, sparsity, selection=rule, previous=previous, choice=choice)
            gone = {(name, int(place)) for name, keep in selection.mask.keep.items()
                    for place in (~keep.flatten()).nonzero()}  # fmt: skip
            assert gone == expected
            assert selection.exhausted == (len(gone) < min(round(sparsity * 34), 33))
            previous = selection.mask
        assert previous.pruned <= prunable(scores, choice)


def test_no_layer_is_ever_emptied_and_keeps_its_best():
    selection = select_mask(score_map({"a": [1.0, 2.0, 1.0], "b": [9.0, 9.5, 9.0]}), 0.83)

    assert kept(selection) == {"a": [0, 1, 0], "b": [0, 1, 0]}
    assert selection.exhausted  # five of six cannot go


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.75])
def test_the_floor_of_each_layer_holds_at_every_sparsity(sparsity):
    generator = torch.Generator().manual_seed(0)
    scores = score_map({"a": torch.rand(10, 10, generator=generator).tolist(),
                        "b": (100 + torch.rand(10, 10, generator=generator)).tolist()})  # fmt: skip

    selection = select_mask(scores, sparsity, choice=Choice(floor=0.25))

    assert selection.mask["a"].sum() == max(25, 100 - 200 * sparsity)
    assert selection.mask.sparsity == sparsity


def test_every_output_of_the_last_layer_keeps_its_best_weight():
    scores = score_map({"body": [[9.0, 8.0, 7.0]], "head": [[1.0, 2.0, 1.0], [6.0, 5.0, 4.0]]})

    rows = select_mask(scores, 4 / 9, choice=Choice(outputs={"head": 0}))
    columns = select_mask(scores, 4 / 9, choice=Choice(outputs={"head": 1}))
    none = select_mask(scores, 4 / 9)

    assert kept(none) == {"body": [[1, 1, 1]], "head": [[0, 0, 0], [1, 1, 0]]}
    assert kept(rows) == {"body": [[1, 1, 1]], "head": [[0, 1, 0], [1, 0, 0]]}
    assert kept(columns) == {"body": [[1, 1, 0]], "head": [[0, 0, 0], [1, 1, 1]]}


def test_an_output_that_is_dead_already_asks_for_nothing():
    previous = Mask({"head": torch.tensor([[False, False], [True, True]])})

    selection = select_mask(score_map({"head": [[1.0, 1.0], [3.0, 2.0]]}), 0.75, previous=previous,
                            choice=Choice(outputs={"head": 0}))  # fmt: skip

    assert kept(selection) == {"head": [[0, 0], [1, 0]]}


def test_layers_reach_the_same_sparsity_in_the_scope_of_layers():
    scores = score_map({"a": [1.0, 2.0, 3.0, 4.0], "b": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0]})

    selection = select_mask(scores, 0.5, choice=Choice(scope="layer"))

    assert kept(selection) == {"a": [0, 0, 1, 1], "b": [0, 0, 0, 0, 1, 1, 1, 1]}


def test_what_a_protected_layer_does_not_give_the_others_do():
    scores = score_map({"a.weight": [1.0, 2.0, 3.0, 4.0], "b.weight": [5.0, 6.0, 7.0, 8.0]})

    by_layer = select_mask(scores, 0.25, choice=Choice(protect=("a",)))
    by_pattern = select_mask(scores, 0.25, choice=Choice(protect=("a.w*",), scope="layer"))

    assert kept(by_layer) == kept(by_pattern) == {"a.weight": [1, 1, 1, 1], "b.weight": [0, 0, 1, 1]}


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"protect=\['c\*'\] matches no layer that is compressed; names look like: a"):
        select_mask(score_map({"a": [1.0, 2.0]}), 0.5, choice=Choice(protect=("a", "c*")))


def test_prunable_counts_what_nothing_holds():
    scores = score_map({"a": [NAN, 1.0, 1.0, 1.0], "b": [1.0, 1.0], "head": [[1.0, 1.0], [1.0, NAN], [1.0, 1.0]]})

    assert prunable(scores) == 3 + 1 + 5  # an unknown one is a layer's weight that stays
    assert prunable(scores, Choice(outputs={"head": 0})) == 3 + 1 + 3
    assert prunable(scores, Choice(floor=0.5, protect=("b",), outputs={"head": 0})) == 2 + 0 + 3


def test_lamp_divides_squares_by_the_sum_of_those_that_are_not_smaller():
    score = torch.tensor([[2.0, NAN], [1.0, 3.0]])

    torch.testing.assert_close(lamp(score), torch.tensor([[4 / 13, NAN], [1 / 14, 1.0]]), equal_nan=True)
    torch.testing.assert_close(lamp(score * 1e-30), lamp(score), equal_nan=True)
    torch.testing.assert_close(lamp(-score * 1e30), lamp(score), equal_nan=True)
    assert lamp(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert lamp(torch.zeros(0)).shape == (0,)


def test_lamp_compares_layers_of_different_scale():
    scores = score_map({"a": [1.0, 2.0, 3.0], "b": [100.0, 300.0, 300.0]})

    plain, normalized = select_mask(scores, 1 / 3), select_mask(scores, 1 / 3, choice=Choice(normalization="lamp"))

    assert kept(plain) == {"a": [0, 0, 1], "b": [1, 1, 1]}
    # 1/14, 4/13, 1 against 1/19, 9/18, 1
    assert kept(normalized) == {"a": [0, 1, 1], "b": [0, 1, 1]}


def test_lamp_goes_by_the_weights_that_are_left():
    scores = score_map({"a": [5.0, 2.0, 2.1], "b": [2.0, 3.0]})
    previous = Mask({"a": torch.tensor([False, True, True]), "b": torch.tensor([True, True])})

    selection = select_mask(scores, 0.4, previous=previous, choice=Choice(normalization="lamp"))

    # 4 / 8.41 of a against 4 / 13 of b; with the weight that is gone it were 4 / 33.41
    assert kept(selection) == {"a": [0, 1, 1], "b": [0, 1]}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"scope": "row"}, "scope must be 'global' or 'layer', got 'row'"),
        ({"floor": 1.0}, r"floor, a share of each layer's weights, must lie in \[0, 1\), got 1.0"),
        ({"floor": "0.1"}, "floor must be a number, got '0.1'"),
        ({"confidence": 0.3}, r"confidence must be None or lie in \[0.5, 1\), got 0.3"),
        ({"normalization": "l2"}, "normalization must be None or 'lamp', got 'l2'"),
        ({"protect": "head"}, r"protect must be a list of strings such as \['head'\], got 'head'"),
    ],
)
def test_choices_out_of_range_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        Choice(**settings)
