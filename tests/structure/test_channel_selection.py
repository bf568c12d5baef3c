"""What a channel is worth, what it costs, and which go."""

import pytest
import torch

from lightning_xai_compress import ScoreMap, score
from lightning_xai_compress.structure import (
    ChannelGroup,
    ChannelSlice,
    Cost,
    channel_scores,
    macs_of,
    select_channels,
    shrunk,
)

from channel_nets import Chain, Depthwise, Grouped, Residual, made
from test_channels import groups_of

pytest.importorskip("torch_pruning")


def group(name, channels, inputs=2):
    """Channels of a weight of so many inputs, used by nothing."""
    return ChannelGroup(name, (ChannelSlice(name, 0, torch.arange(channels).unsqueeze(1), makes=True),))


def cost_of(*sizes, price=1.0):
    groups = [group(name, channels) for name, channels in sizes]
    return groups, Cost(groups, {name: (channels, 2) for name, channels in sizes}, {name: price for name, _ in sizes})


def test_a_channel_is_worth_what_its_weights_are():
    scores = {"a": torch.tensor([[1.0, 3.0], [0.0, 4.0]]), "b": torch.tensor([[2.0], [6.0]])}
    relevance = {"a": torch.tensor([[1.0, -3.0], [0.0, 4.0]]), "b": torch.tensor([[-2.0], [6.0]])}
    found = ScoreMap(scores, relevance, scores, 1)
    alone = ChannelGroup("a", (ChannelSlice("a", 0, torch.tensor([[0], [1]]), makes=True),))
    both = ChannelGroup("a", (*alone.slices, ChannelSlice("b", 0, torch.tensor([[0], [1]]), makes=True)))

    def of(one, how):
        return channel_scores([one], found, how)["a"].tolist()

    assert of(alone, "sum") == of(alone, "mean") == [0.5, 0.5]
    assert of(alone, "rms") == [pytest.approx(5**0.5 / (5**0.5 + 8**0.5)), pytest.approx(8**0.5 / (5**0.5 + 8**0.5))]
    assert of(alone, "output") == [pytest.approx(2 / 6), pytest.approx(4 / 6)]
    assert of(both, "sum") == [0.75, 1.25]  # what both layers put there


def test_a_users_of_a_channel_do_not_score_it():
    net, x = made(Residual)
    groups, _ = groups_of(net, x)
    scores = score(net, [(x, torch.tensor([0, 1, 2, 0]))])

    found = channel_scores(groups, scores)["inner.weight"]

    filters = scores.score["inner.weight"].flatten(1).sum(1)
    torch.testing.assert_close(found, filters / filters.sum())


def test_a_layer_that_does_not_know_a_channel_counts_like_the_others_mean():
    scores = {"a": torch.tensor([[1.0], [3.0]]), "b": torch.tensor([[torch.nan], [1.0]])}
    found = ScoreMap(scores, scores, scores, 1)
    place = torch.tensor([[0], [1]])
    parts = [ChannelSlice(name, 0, place, makes=True) for name in ("a", "b", "never scored")]

    worth = channel_scores([ChannelGroup("a", tuple(parts))], found)["a"]

    assert worth.tolist() == [0.75, pytest.approx((0.75 + 1) / 2 * 3)]


def test_an_unknown_weight_makes_its_channel_unknown_which_stays():
    groups, cost = cost_of(("a", 4))
    scores = {"a": torch.tensor([[1.0, 1.0], [torch.nan, 0.0], [2.0, 2.0], [3.0, 3.0]])}

    worth = channel_scores(groups, ScoreMap(scores, scores, scores, 1))
    removed = select_channels(groups, worth, cost, 0.01, multiple=1, floor=0)

    assert worth["a"].isnan().tolist() == [False, True, False, False]
    assert removed["a"].tolist() == [True, False, True, True]


@pytest.mark.parametrize("how", ["sum", "mean", "rms"])
def test_scores_without_a_sign_have_no_output_relevance(how):
    scores = {"a": torch.ones(4, 2)}
    unsigned = ScoreMap(scores, scores, scores, 1, signed=False)

    channel_scores([group("a", 4)], unsigned, how)
    with pytest.raises(ValueError, match="a channel's score 'output' is of signed relevance"):
        channel_scores([group("a", 4)], unsigned, "output")
    with pytest.raises(ValueError, match="must be one of sum, mean, rms, output, got 'max'"):
        channel_scores([group("a", 4)], unsigned, "max")


@pytest.mark.parametrize("kind", [Chain, Residual, Depthwise, Grouped])
@pytest.mark.parametrize("measure", ["macs", "parameters"])
def test_the_cost_is_that_of_the_smaller_model(kind, measure):
    net, x = made(kind)
    groups, _ = groups_of(net, x)
    weights = {name: weight for name, weight in net.named_parameters() if weight.dim() > 1}
    counted, rest = macs_of(net, lambda: net(x))
    assert counted.keys() == weights.keys()
    prices = {name: counted[name] / weights[name].numel() if measure == "macs" else 1.0 for name in weights}
    shapes = {name: weight.shape for name, weight in weights.items()}
    cost = Cost(groups, shapes, prices, rest if measure == "macs" else 0.0)

    removed = select_channels(groups, {each.name: torch.rand(len(each)) for each in groups}, cost, 0.5, multiple=2)

    with shrunk(net, groups, removed):
        small, other = macs_of(net, lambda: net(x))
        entries = sum(weight.numel() for weight in net.parameters() if weight.dim() > 1)
    expected = sum(small.values()) + other if measure == "macs" else entries
    assert cost.now == pytest.approx(expected)
    assert 0.25 < cost.share <= 0.5
    assert rest == 0


def test_macs_are_those_of_the_layers():
    net, x = made(Chain)

    found, rest = macs_of(net, lambda: net(x))

    assert found["first.weight"] == 4 * 16 * 9 * 16  # samples, positions, entries of a filter, filters
    assert found["hidden.weight"] == 4 * 96 * 32
    assert rest == 0


def test_the_least_important_go_first_whatever_their_group():
    groups, cost = cost_of(("a", 4), ("b", 4))
    worth = {"a": torch.tensor([0.5, 3.0, 0.1, 4.0]), "b": torch.tensor([0.3, 0.2, 5.0, 6.0])}

    removed = select_channels(groups, worth, cost, 0.6, multiple=1, floor=0)

    # 0.1, 0.2 and 0.3 are three of eight, 0.5 the fourth
    assert removed["a"].tolist() == [True, False, True, False]
    assert removed["b"].tolist() == [True, True, False, False]
    assert cost.share == 0.5


@pytest.mark.parametrize("price", [1.0, 7.0])
def test_what_saves_more_goes_before_what_matters_as_little(price):
    groups = [group("cheap", 4), group("dear", 4), group("free", 4)]
    shapes = {"cheap": (4, 2), "dear": (4, 10), "free": (4, 10)}
    cost = Cost(groups, shapes, {"cheap": price, "dear": price})
    worth = {"cheap": torch.tensor([0.1, 0.3, 0.3, 0.3]), "dear": torch.full((4,), 0.25), "free": torch.zeros(4)}
    assert [cost.saving(each.name) for each in groups] == [pytest.approx(2 / 48), pytest.approx(10 / 48), 0]

    removed = select_channels(groups, worth, cost, 0.5, multiple=1, floor=0)

    # for each 48th: 0.025 of "dear", 0.05 and 0.15 of "cheap"; nothing is saved by what is free
    assert {name: gone.tolist() for name, gone in removed.items()} == {
        "cheap": [False] * 4,
        "dear": [True, True, True, False],
        "free": [False] * 4,
    }
    assert cost.share == pytest.approx(18 / 48)


def test_what_the_last_one_makes_needless_stays():
    groups = [group("many", 10), group("one", 2)]
    shapes = {"many": (10, 1), "one": (2, 40)}
    cost = Cost(groups, shapes, {"many": 1.0, "one": 1.0})
    worth = {"many": torch.tensor([*[0.01] * 3, *[10.0] * 7]), "one": torch.tensor([1.0, 9.0])}

    removed = select_channels(groups, worth, cost, 0.55, multiple=1, floor=0)

    # three of "many" are 3 of 90, and one of "one" is 40 more; with 41 gone 49 are left, and 0.55 of 90 are 49.5
    assert removed["many"].nonzero().flatten().tolist() == [0]
    assert removed["one"].tolist() == [True, False]
    assert cost.now == 49


def test_asking_for_a_saving_changes_nothing():
    _, cost = cost_of(("a", 3), ("b", 7), price=1 / 3)
    before = cost.now

    for _ in range(100):
        cost.saving("a")

    assert cost.now == before


def test_what_stays_is_a_round_number_and_what_is_gone_stays_away():
    groups, cost = cost_of(("a", 20), ("b", 6))
    worth = {"a": torch.arange(20).float(), "b": torch.full((6,), 100.0)}
    gone = torch.arange(20) == 19

    removed = select_channels(groups, worth, cost, 0.85, previous={"a": gone}, multiple=8, floor=0)

    assert removed["a"].nonzero().flatten().tolist() == [0, 1, 2, 19]  # 19 became 16
    assert not removed["b"].any()
    assert cost.share == 22 / 26


def test_floors_hold_and_a_group_is_never_emptied():
    groups, cost = cost_of(("a", 32), ("b", 4))
    worth = {"a": torch.zeros(32), "b": torch.ones(4)}

    removed = select_channels(groups, worth, cost, 0.001, multiple=8, floor=0.4)

    assert int(removed["a"].sum()) == 16  # 0.4 of 32 are 13, and the next multiple of 8 is 16
    assert int(removed["b"].sum()) == 2
    _, cost = cost_of(("a", 32), ("b", 4))
    removed = select_channels(groups, worth, cost, 0.001, multiple=8, floor=0)
    assert {name: int((~gone).sum()) for name, gone in removed.items()} == {"a": 8, "b": 1}


def test_ties_go_by_name_and_index():
    groups, cost = cost_of(("b", 4), ("a", 4))

    removed = select_channels(groups, {"a": torch.ones(4), "b": torch.ones(4)}, cost, 0.7, multiple=1, floor=0)

    assert removed["a"].tolist() == [True, True, True, False]
    assert not removed["b"].any()
