"""Who gets how many bits: against brute force, hand-worked tiers, and the settings that limit the choice."""

from itertools import pairwise, product

import pytest
import torch

from lightning_xai_compress import ScoreMap, allocate_bits
from lightning_xai_compress.quantization import fit_scales, fixed_widths, measure_widths, quantize
from lightning_xai_compress.quantization.knapsack import knapsack, lower_bound, tiers


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score_map(sensitivity, *, score=None):
    return ScoreMap(score or sensitivity, sensitivity, sensitivity, samples=1, signed=score is None)


def spread(weights, seed=0):
    """Sensitivities that differ by orders of magnitude from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    return score_map(
        {
            name: 10 ** (4 * torch.rand(len(each), *[1] * (each.dim() - 1), generator=generator)).expand_as(each)
            for name, each in weights.items()
        }
    )


def layers(seed=0):
    return {"conv.weight": normal(8, 4, 3, 3, seed=seed), "head.weight": normal(3, 8, seed=seed + 1)}


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_lies_below_the_best_of_all_choices_and_the_choice_above_it(seed):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(5, 3, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    cost *= 10 ** (3 * torch.rand(5, 1, generator=generator, dtype=torch.float64))
    cost[0, 2] = torch.inf  # an item that must not take its last option
    price = torch.rand(5, 3, generator=generator, dtype=torch.float64).cumsum(1)
    least = float(price[:, 0].sum())
    budget = least + 0.4 * (float(price[:, 2].sum()) - least)
    every = [torch.tensor(choice) for choice in product(range(3), repeat=5)]

    def total(values, choice):
        return float(values[range(5), choice].sum())

    best = min(total(cost, choice) for choice in every if total(price, choice) <= budget)

    choice, bound = knapsack(cost, price, budget), lower_bound(cost, price, budget)

    assert total(price, choice) <= budget
    assert bound <= best * (1 + 1e-9)
    assert best <= total(cost, choice) <= 1.3 * best
    assert bound >= 0.5 * best


def test_the_bound_is_the_cost_where_the_budget_buys_everything():
    weights = layers()

    found = allocate_bits(weights, spread(weights), average_bits=8.0)

    assert all((each == 8).all() for each in found.allocation.bits.values())
    assert found.cost == found.bound > 0
    assert found.gap == 0


def test_cost_is_the_weighted_error_of_the_grids_and_the_gap_what_it_lies_above_the_bound():
    weights = {"conv.weight": normal(30, 4, 3, 3), "head.weight": normal(20, 30, seed=1)}
    scores = spread(weights)

    found = allocate_bits(weights, scores, average_bits=3.3)

    error = sum(
        float(
            (scores.sensitivity[name] * (quantize(each, found.allocation[name], found.scales[name]) - each) ** 2).sum()
        )
        for name, each in weights.items()
    )
    assert found.cost == pytest.approx(error, rel=1e-5)
    assert found.gap == pytest.approx((found.cost - found.bound) / found.cost)
    assert 0 < found.gap < 0.05
    assert found.bytes == pytest.approx(found.allocation.average_bits * 1680 / 8)


def test_a_measured_table_gives_for_every_budget_what_one_call_gives():
    weights = layers()
    scores = spread(weights)
    table = measure_widths(weights, scores, bits=(2, 4, 8))

    for average in (2.0, 3.1, 5.0, 8.0):
        chosen, direct = table.choose(average), allocate_bits(weights, scores, average_bits=average, bits=(2, 4, 8))
        assert chosen.cost == direct.cost
        for name in weights:
            assert torch.equal(chosen.allocation[name], direct.allocation[name])
            assert torch.equal(chosen.scales[name], direct.scales[name])


def test_scales_are_those_that_fit_the_chosen_width():
    weights = layers()

    found = allocate_bits(weights, spread(weights), average_bits=4.0)

    for name, each in weights.items():
        for row, width in enumerate(found.allocation[name].tolist()):
            assert found.scales[name][row] == fit_scales(each, width)[0][row]
    assert len(set(found.allocation["conv.weight"].tolist())) > 1


def test_pruned_weights_cost_nothing_at_any_width():
    weights = {"fc": normal(4, 8)}
    weights["fc"][1:3] = 0.0

    found = allocate_bits(weights, spread(weights), average_bits=5.0, bits=(2, 8))

    assert found.allocation["fc"].tolist() == [8, 2, 2, 8]


def test_errors_alone_count_without_scores():
    weights = {"fc": normal(1, 16).repeat(3, 1) * torch.tensor([[1.0], [8.0], [1.0]])}

    plain = allocate_bits(weights, None, average_bits=4.0, bits=(2, 8)).allocation
    weighted = allocate_bits(
        weights,
        score_map({"fc": torch.tensor([[1.0], [0.001], [100.0]]).expand(3, 16)}),
        average_bits=4.0,
        bits=(2, 8),
    ).allocation

    assert plain["fc"].tolist() == [2, 8, 2]
    assert weighted["fc"].tolist() == [2, 2, 8]


# --- tiers


def test_tiers_are_equal_where_the_budget_is_that_of_equal_tiers():
    rank = torch.tensor([5.0, 1.0, 3.0, 6.0, 2.0, 4.0])
    size = torch.full((6,), 10.0, dtype=torch.float64)
    price = size.unsqueeze(1) * torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64)

    choice = tiers(rank, size, torch.zeros(6, 3), price, budget=2 * 10 * (2 + 4 + 8))

    assert choice.tolist() == [2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("average", [2.0, 2.4, 3.0, 4.6, 6.1, 8.0])
@pytest.mark.parametrize("seed", range(3))
def test_more_relevance_never_gets_fewer_bits_and_the_budget_is_met_from_below(average, seed):
    weights = {"a": normal(40, 6, seed=seed), "b": normal(30, 6, seed=seed + 10)}
    scores = spread(weights, seed)

    found = allocate_bits(weights, scores, average_bits=average, strategy="ranked")

    relevance = torch.cat([(scores.sensitivity[name].sqrt() * weights[name].abs()).mean(1) for name in "ab"])
    bits = torch.cat([found.allocation[name] for name in "ab"])[relevance.argsort()].tolist()
    assert all(less <= more for less, more in pairwise(bits))
    assert average - 2 / 70 <= found.allocation.average_bits <= average  # widening one of 70 rows costs 1 or 2 bits
    assert found.cost >= found.bound


def test_scores_without_a_sign_rank_themselves():
    weights = {"fc": torch.ones(4, 2)}
    scores = score_map({"fc": torch.ones(4, 2)}, score={"fc": torch.tensor([[3.0], [1.0], [4.0], [2.0]]).expand(4, 2)})

    found = allocate_bits(weights, scores, average_bits=5.0, bits=(2, 8), strategy="ranked")

    assert found.allocation["fc"].tolist() == [8, 2, 8, 2]


def test_tiers_leave_unknown_channels_the_largest_width():
    weights = {"a": normal(2, 8), "b": normal(6, 8)}
    scores = score_map({"a": torch.full((2, 8), torch.nan), "b": torch.ones(6, 8)})

    found = allocate_bits(weights, scores, average_bits=4.0, bits=(2, 4, 8), strategy="ranked")

    assert found.allocation["a"].tolist() == [8, 8]
    assert 3.5 < found.allocation.average_bits <= 4.0


# --- what has one width


def test_a_layer_has_one_width_but_a_scale_for_each_channel():
    weights = layers()

    found = allocate_bits(weights, spread(weights), average_bits=3.5, bits_per="layer")

    assert all(len(set(each.tolist())) == 1 for each in found.allocation.bits.values())
    assert len(set(found.scales["conv.weight"].tolist())) == 8
    assert found.allocation.average_bits <= 3.5


def test_groups_of_input_channels_are_rows_with_widths_and_scales_of_their_own():
    """One group of one channel matters; it gets the bits, and values are on the grid of its own scale."""
    weights = {"conv.weight": normal(2, 6, 1, 2)}
    sensitivity = torch.ones(2, 6, 1, 2)
    sensitivity[1, 2:4] = 1000.0
    weights["conv.weight"][1, 2:4] *= 0.1

    found = allocate_bits(
        weights, score_map({"conv.weight": sensitivity}), average_bits=3.0, bits=(2, 8), bits_per="group", group_size=2
    )

    assert found.allocation["conv.weight"].tolist() == [2, 2, 2, 2, 8, 2]
    assert found.allocation.channel_size == {"conv.weight": 4}
    assert found.allocation.average_bits == 3.0
    expected = fit_scales(weights["conv.weight"][1:, 2:4], 8)[0]
    assert found.scales["conv.weight"][4] == expected[0]
    values = quantize(weights["conv.weight"], found.allocation["conv.weight"], found.scales["conv.weight"])
    assert torch.equal(
        values[1:, 2:4], quantize(weights["conv.weight"][1:, 2:4], torch.tensor([8], dtype=torch.uint8), expected)
    )


def test_weights_that_the_group_size_does_not_divide_keep_one_group_a_channel():
    weights = {"first": normal(4, 3), "second": normal(4, 8)}

    found = allocate_bits(weights, spread(weights), average_bits=4.0, bits_per="group", group_size=4)

    assert {name: len(each) for name, each in found.allocation.bits.items()} == {"first": 4, "second": 8}
    assert found.allocation.channel_size == {"first": 3, "second": 4}


# --- widths by name


def test_fixed_widths_count_in_the_budget_and_need_not_be_offered():
    weights = layers()
    scores = spread(weights)

    found = allocate_bits(weights, scores, average_bits=3.0, bits=(2, 4), widths={"head*": 7})
    without = allocate_bits(weights, scores, average_bits=3.0, bits=(2, 4))

    assert found.allocation["head.weight"].tolist() == [7, 7, 7]
    assert set(found.allocation["conv.weight"].tolist()) == {2, 4}
    assert 2.8 < found.allocation.average_bits <= 3.0
    assert found.allocation["conv.weight"].sum() < without.allocation["conv.weight"].sum()
    assert torch.equal(found.scales["head.weight"], fit_scales(weights["head.weight"], 7)[0])


def test_a_fixed_width_wins_over_the_largest_one_for_unknown_relevance():
    weights = {"a": normal(2, 8), "b": normal(6, 8)}
    scores = score_map({"a": torch.full((2, 8), torch.nan), "b": torch.ones(6, 8)})

    found = allocate_bits(weights, scores, average_bits=3.0, bits=(2, 8), widths={"a": 3})

    assert found.allocation["a"].tolist() == [3, 3]


def test_the_first_pattern_that_matches_wins_and_layer_names_match_too():
    names = ["head.weight", "block.0.weight", "block.1.weight"]

    fixed = fixed_widths(names, {"block.1*": 3, "block*": 6, "head": 8})

    assert fixed == {"block.0.weight": 6, "block.1.weight": 3, "head.weight": 8}


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match=r"widths=\['heads\*'\] matches no weight that is quantized; those are: a, b"):
        fixed_widths(["b", "a"], {"a": 3, "heads*": 8})


@pytest.mark.parametrize(
    ("widths", "text"),
    [
        ({"a": 9}, r"widths must be whole numbers in 2..8, got \{'a': 9\}"),
        ({"a": 1}, r"widths must be whole numbers in 2..8, got \{'a': 1\}"),
        ({"a": 4.5}, "width of 'a' must be a whole number, got 4.5"),
        ([8], r"widths must map patterns to bits such as \{'head\*': 8\}, got \[8\]"),
    ],
)
def test_widths_that_are_none_are_refused(widths, text):
    with pytest.raises(ValueError, match=text):
        fixed_widths(["a"], widths)


# --- prices and byte budgets


def test_a_byte_budget_counts_width_times_weights_unless_a_price_is_given():
    weights = layers()
    scores = spread(weights)

    by_bytes = allocate_bits(weights, scores, max_bytes=3.3 * 312 / 8)
    by_bits = allocate_bits(weights, scores, average_bits=3.3)

    assert by_bytes.bytes == by_bits.bytes
    for name in weights:
        assert torch.equal(by_bytes.allocation[name], by_bits.allocation[name])


def test_a_price_of_ones_own_sees_the_codes_and_is_what_the_budget_counts():
    """Where only codes other than zero cost, a mostly pruned channel is cheap, and gets more bits than by width."""
    weights = {"fc": torch.stack([normal(64).abs() + 0.5, torch.ones(64)])}
    weights["fc"][0, 8:] = 0.0
    seen = []

    def price(codes, width):
        seen.append((width, int(codes["fc"].abs().max()), tuple(codes["fc"].shape), codes["fc"].dtype))
        return {name: float(width) * (each != 0).sum(1) for name, each in codes.items()}

    plain = allocate_bits(weights, None, max_bytes=(64 * 2 + 64 * 2 + 8 * 6) / 8, bits=(2, 8))
    priced = allocate_bits(weights, None, max_bytes=(64 * 2 + 8 * 2 + 8 * 6) / 8, bits=(2, 8), price=price)

    assert seen == [(2, 1, (2, 64), torch.int8), (8, 127, (2, 64), torch.int8)]
    assert plain.allocation["fc"].tolist() == [2, 2]
    assert priced.allocation["fc"].tolist() == [8, 2]
    assert priced.bytes == (64 * 2 + 8 * 8) / 8


# --- bad input


def test_budgets_that_cannot_be_met_say_the_numbers():
    weights = layers()
    table = measure_widths(weights, spread(weights), bits=(2, 4), widths={"conv*": 6})

    with pytest.raises(ValueError, match=r"average_bits=3.0 cannot be met: conv.weight is fixed at 6 bits, .* 5.69"):
        table.choose(3.0)
    with pytest.raises(ValueError, match=r"max_bytes=77 cannot be met: with the smallest width for all it is 78 bytes"):
        measure_widths(weights, spread(weights)).choose(max_bytes=77)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "give one of average_bits=None and max_bytes=None"),
        ({"average_bits": 3.0, "max_bytes": 10.0}, "give one of average_bits=3.0 and max_bytes=10.0"),
        ({"average_bits": 3.0, "strategy": "rank"}, "strategy must be 'knapsack' or 'ranked', got 'rank'"),
        ({"average_bits": 3.0, "bits_per": "row"}, "bits_per must be 'layer', 'channel' or 'group', got 'row'"),
        ({"average_bits": 3.0, "bits_per": "group"}, "goes with a group_size, .* got group, None"),
        ({"average_bits": 3.0, "group_size": 4}, "goes with a group_size, .* got channel, 4"),
        ({"average_bits": 3.0, "bits_per": "group", "group_size": 0}, "group_size must be >= 1, got 0"),
        ({"average_bits": 9.0, "widths": {"a": 8}}, r"of bits=\(2, 3, 4, 6, 8\) and widths=\[8\], got 9.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    weights = {"a": normal(2, 4)}
    with pytest.raises(ValueError, match=text):
        allocate_bits(weights, spread(weights), **settings)
