"""Which weights go, by hand."""

import pytest
import torch

from lightning_xai_compress import Mask, ScoreMap, select_mask
from lightning_xai_compress.pruning import Choice, nonpositive_share


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
    scores = score_map(a=[float("nan"), float("nan")], b=[-1.0, 2.0, -3.0], relevance={
        "a": [float("nan"), float("nan")], "b": [-1.0, 1.0, -3.0]
    })  # fmt: skip

    selection = select_mask(scores, 0.8, selection=rule)

    assert selection.mask["a"].tolist() == [True, True]
    assert selection.mask["b"].tolist() == [False, True, False]  # a layer keeps its best weight
    assert selection.mask.sparsity == 0.4
    assert selection.exhausted


def test_ties_go_by_name_and_index():
    scores = score_map(b=[1.0, 1.0], a=[1.0, 1.0])

    one, two = select_mask(scores, 0.25), select_mask(scores, 0.5)

    assert (one.mask["a"].tolist(), one.mask["b"].tolist()) == ([False, True], [True, True])
    assert (two.mask["a"].tolist(), two.mask["b"].tolist()) == ([False, True], [False, True])


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
    with pytest.raises(ValueError, match="selection must be 'nonpositive', 'literal' or 'least', got 'worst'"):
        select_mask(score_map(fc=[1.0]), 0.5, selection="worst")


def test_nonpositive_share_counts_zero_and_leaves_unknown_out_of_the_set():
    scores = score_map(relevance={"a": [0.0, -1.0, 2.0], "b": [float("nan")]}, a=[1.0, 1.0, 1.0], b=[1.0])

    assert nonpositive_share(scores) == 0.5


def test_literal_takes_the_whole_set_at_once_and_warns():
    scores = score_map(relevance={"fc": [0.1, -2.0, 0.0, 1.0], "out": [-1.0, -1.0, -1.0, 1.0]}, fc=[0.1, 2.0, 3.0, 1.0],
        out=[3.0, 2.0, 1.0, 1.0])  # fmt: skip

    with pytest.warns(UserWarning, match="selection='literal' prunes every weight .* worse than after random pruning"):
        selection = select_mask(scores, None, selection="literal")

    assert selection.mask["fc"].tolist() == [True, False, False, True]
    assert selection.mask["out"].tolist() == [False, False, False, True]
    assert (selection.removed, selection.positive) == (5, 0)


def test_literal_leaves_a_weight_where_all_are_nonpositive():
    scores = score_map(relevance={"fc": [-1.0, -1.0, 0.0]}, fc=[1.0, 3.0, 2.0])

    with pytest.warns(UserWarning, match="literal"):
        assert select_mask(scores, None, selection="literal").mask["fc"].tolist() == [False, True, False]


def test_literal_and_a_sparsity_exclude_each_other():
    scores = score_map(fc=[1.0, -1.0])
    with pytest.raises(
        ValueError, match=r"selection='literal' takes all weights with relevance <= 0: sparsity=0\.5 must"
    ):
        select_mask(scores, 0.5, selection="literal")
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got None"):
        select_mask(scores, None, selection="nonpositive")


@pytest.mark.parametrize("rule", ["nonpositive", "literal"])
def test_rules_that_go_by_the_sign_need_one(rule):
    scores = ScoreMap(*[{"fc": torch.ones(2)}] * 3, samples=1, signed=False)
    with pytest.raises(ValueError, match=f"selection='{rule}' needs scores with a sign"):
        select_mask(scores, 0.5 if rule == "nonpositive" else None, selection=rule)


def sure_and_unsure():
    """With 9 batches, t is 1.86 at 95 %: R + 1.86 s is <= 0 for the first alone."""
    relevance = {"fc": torch.tensor([-2.0, -1.0, 0.5, 1.0])}
    error = {"fc": torch.tensor([1.0, 1.0, 1.0, 1.0])}
    score = {"fc": torch.tensor([4.0, 1.0, 2.0, 3.0])}
    return ScoreMap(score, relevance, score, samples=9, standard_error=error, batches=9)


def test_with_confidence_only_surely_nonpositive_weights_go_first():
    by_mean = select_mask(sure_and_unsure(), 0.25, selection="nonpositive")
    surely = select_mask(sure_and_unsure(), 0.25, selection="nonpositive", choice=Choice(confidence=0.95))
    further = select_mask(sure_and_unsure(), 0.75, selection="nonpositive", choice=Choice(confidence=0.95))

    assert by_mean.mask["fc"].tolist() == [True, False, True, True]
    assert surely.mask["fc"].tolist() == [False, True, True, True]
    assert further.mask["fc"].tolist() == [False, False, False, True]
    assert further.positive == 1  # the second is not sure to be non-positive, but it is not positive either
    assert nonpositive_share(sure_and_unsure()) == 0.5
    assert nonpositive_share(sure_and_unsure(), 0.95) == 0.25


def test_confidence_without_a_sign_or_a_standard_error_is_refused():
    with pytest.raises(ValueError, match="confidence is of the sign of relevance: use selection='nonpositive'"):
        select_mask(sure_and_unsure(), 0.5, choice=Choice(confidence=0.95))
    with pytest.raises(ValueError, match="confidence needs a standard error"):
        select_mask(score_map(fc=[1.0, -1.0]), 0.5, selection="nonpositive", choice=Choice(confidence=0.95))
