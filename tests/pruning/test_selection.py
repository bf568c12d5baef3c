"""Which weights go, by hand."""

import pytest
import torch

from lightning_xai_compress import Mask, ScoreMap, select_mask
from lightning_xai_compress.pruning import cubic, nonpositive_share


def score_map(relevance=None, **score):
    scores = {name: torch.tensor(values) for name, values in score.items()}
    signs = {name: torch.tensor((relevance or score)[name]) for name in score}
    return ScoreMap(scores, signs, {name: tensor.clone() for name, tensor in scores.items()}, samples=1)


def test_least_relevant_weights_go_first():
    scores = score_map(fc=[[3.0, 1.0], [4.0, 2.0]])

    selection = select_mask(scores, 0.5)

    assert selection.mask["fc"].tolist() == [[True, False], [True, False]]
    assert (selection.removed, selection.positive, selection.exhausted) == (2, 2, False)


def test_the_ranking_is_global():
    selection = select_mask(score_map(a=[5.0, 1.0], b=[2.0, 3.0]), 0.5)

    assert selection.mask["a"].tolist() == [True, False]
    assert selection.mask["b"].tolist() == [False, True]


def test_nonpositive_weights_go_before_smaller_positive_ones():
    scores = score_map(relevance={"fc": [0.1, -2.0, 0.0, 1.0]}, fc=[0.1, 2.0, 3.0, 1.0])

    first = select_mask(scores, 0.25, selection="nonpositive")
    second = select_mask(scores, 0.5, selection="nonpositive", previous=first.mask)

    assert first.mask["fc"].tolist() == [True, False, True, True]
    assert second.mask["fc"].tolist() == [True, False, False, True]
    assert first.positive == second.positive == 0


def test_positive_weights_follow_least_first_when_the_set_runs_out_and_are_counted():
    scores = score_map(relevance={"fc": [0.5, -2.0, 3.0, 1.0]}, fc=[0.5, 2.0, 3.0, 1.0])

    selection = select_mask(scores, 0.75, selection="nonpositive")

    assert selection.mask["fc"].tolist() == [False, False, True, False]
    assert (selection.removed, selection.positive, selection.exhausted) == (3, 2, False)


def test_without_positives_the_set_is_exhausted():
    scores = score_map(relevance={"fc": [0.5, -2.0, 3.0, 1.0]}, fc=[0.5, 2.0, 3.0, 1.0])

    selection = select_mask(scores, 0.75, selection="nonpositive", positives=False)

    assert selection.mask["fc"].tolist() == [True, False, True, True]
    assert (selection.removed, selection.positive, selection.exhausted) == (1, 0, True)


@pytest.mark.parametrize("rule", ["least", "nonpositive"])
def test_unknown_weights_stay_and_count_in_the_total(rule):
    scores = score_map(a=[float("nan"), float("nan")], b=[1.0, -2.0])

    selection = select_mask(scores, 0.75, selection=rule)

    assert selection.mask["a"].tolist() == [True, True]
    assert selection.mask["b"].tolist() == [False, False]
    assert selection.mask.sparsity == 0.5
    assert selection.exhausted


def test_ties_go_by_name_and_index():
    scores = score_map(b=[1.0, 1.0], a=[1.0, 1.0])

    selection = select_mask(scores, 0.75)

    assert selection.mask["a"].tolist() == [False, False]
    assert selection.mask["b"].tolist() == [False, True]


def test_what_was_pruned_stays_pruned():
    previous = Mask({"fc": torch.tensor([True, True, True, False])})

    selection = select_mask(score_map(fc=[1.0, 2.0, 3.0, 4.0]), 0.5, previous=previous)
    same = select_mask(score_map(fc=[1.0, 2.0, 3.0, 4.0]), 0.25, previous=previous)

    assert selection.mask["fc"].tolist() == [False, True, True, False]
    assert same.mask["fc"].tolist() == [True, True, True, False]
    assert same.removed == 0


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        select_mask(score_map(fc=[1.0]), sparsity)


def test_a_sparsity_below_one_never_takes_the_last_weight():
    assert select_mask(score_map(fc=[1.0, 2.0, 3.0]), 0.999).mask["fc"].tolist() == [False, False, True]


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="selection must be 'nonpositive' or 'least', got 'worst'"):
        select_mask(score_map(fc=[1.0]), 0.5, selection="worst")


def test_nonpositive_share_counts_zero_and_leaves_unknown_out_of_the_set():
    scores = score_map(relevance={"a": [0.0, -1.0, 2.0], "b": [float("nan")]}, a=[1.0, 1.0, 1.0], b=[1.0])

    assert nonpositive_share(scores) == 0.5


def test_the_ramp_is_cubic():
    assert cubic(0.0, final=0.8) == 0.0
    assert cubic(0.5, final=0.8) == pytest.approx(0.7)  # 0.8 * (1 - 0.125)
    assert cubic(1.0, final=0.8) == pytest.approx(0.8)
