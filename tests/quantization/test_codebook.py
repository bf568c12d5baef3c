"""K-means in one dimension, with zero as a value of its own: against brute force, and what allocation makes of it."""

from itertools import combinations

import pytest
import torch

from lightning_xai_compress import ScoreMap, allocate_bits
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask, look_up
from lightning_xai_compress.quantization import fit_codebook, measure_widths, nearest_codes, refit_codebook


def error(values, codebook, importance=None):
    squared = (look_up(nearest_codes(values, codebook), codebook) - values).square()
    return float((squared if importance is None else squared * importance).sum())


def brute_force(values, importance, count):
    """Least error of `count` centroids beside zero, for positive values: all ways to cut them into runs."""
    order = values.argsort()
    values, importance = values[order].double(), importance[order].double()
    best = float("inf")
    for cuts in combinations(range(len(values) + 1), count):
        found = float((importance[: cuts[0]] * values[: cuts[0]].square()).sum())
        for start, end in zip(cuts, (*cuts[1:], len(values)), strict=True):
            part, weight = values[start:end], importance[start:end]
            if len(part):
                mean = (part * weight).sum() / weight.sum()
                found += float((weight * (part - mean).square()).sum())
        best = min(best, found)
    return best


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_values_leave_less_error(bits, seed):
    torch.manual_seed(seed)
    values, importance = torch.rand(11) * 3 + 0.01, torch.rand(11) + 0.1

    codebook = fit_codebook(values, bits, importance)

    least = brute_force(values, importance, 2 ** (bits - 1) - 1)
    assert error(values, codebook, importance) == pytest.approx(least, rel=0.01, abs=1e-4)  # values are bfloat16


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_a_codebook_rises_through_zero_and_beats_a_grid(bits):
    torch.manual_seed(0)
    weight = torch.randn(64, 100) * torch.rand(64, 100).square()

    codebook = fit_codebook(weight, bits)

    assert codebook.shape == (1, 2**bits - 1)
    assert codebook[0, 2 ** (bits - 1) - 1] == 0
    assert (codebook.diff() >= 0).all()
    assert torch.equal(codebook.to(torch.bfloat16).float(), codebook)
    limit = 2 ** (bits - 1) - 1
    grids = [
        (weight / step).round().clamp(-limit, limit) * step
        for step in torch.linspace(0.2, 1.0, 40) * weight.abs().max() / limit
    ]
    grid = min(float((each - weight).square().sum()) for each in grids)
    assert error(weight, codebook) <= grid * (0.85 if bits in (3, 4, 6) else 1)


def test_importance_draws_values_to_itself():
    weight = torch.tensor([1.0, 1.2, 2.0])

    plain = fit_codebook(weight, 2)
    drawn = fit_codebook(weight, 2, torch.tensor([100.0, 1.0, 1.0]))

    assert plain[0, 2] == pytest.approx(1.4, rel=0.005)
    assert drawn[0, 2] == pytest.approx((100 + 1.2 + 2) / 102, rel=0.005)
    assert torch.equal(fit_codebook(weight, 2, torch.zeros(3)), plain)


def test_every_block_of_channels_has_the_codebook_that_it_would_have_alone():
    torch.manual_seed(0)
    weight, importance = (
        torch.randn(6, 4, 3) * torch.tensor([1.0, 1, 5, 5, 0.1, 0.1]).view(-1, 1, 1),
        torch.rand(6, 4, 3),
    )

    codebook = fit_codebook(weight, 3, importance, blocks=3)
    codes = nearest_codes(weight, codebook)
    values, moved = look_up(codes, codebook), refit_codebook(weight * 1.1, codes, codebook, importance)

    assert codebook.shape == moved.shape == (3, 7)
    for block in range(3):
        rows, alone = slice(2 * block, 2 * block + 2), codebook[block : block + 1]
        assert torch.equal(alone, fit_codebook(weight[rows], 3, importance[rows]))
        assert torch.equal(codes[rows], nearest_codes(weight[rows], alone))
        assert torch.equal(values[rows], look_up(codes[rows], alone))
        expected = refit_codebook(weight[rows] * 1.1, codes[rows], alone, importance[rows])
        assert torch.equal(moved[block : block + 1], expected)
    assert error(weight, codebook, importance) < 0.5 * error(weight, fit_codebook(weight, 3, importance), importance)


@pytest.mark.parametrize("weight", [torch.zeros(4, 3), torch.full((4, 3), 0.5), -torch.rand(4, 3), torch.empty(0, 3)])
def test_a_layer_with_few_values_keeps_them(weight):
    codebook = fit_codebook(weight, 3)

    found = look_up(nearest_codes(weight, codebook), codebook)

    assert codebook.shape == (1, 7)
    assert not found[weight == 0].any()
    torch.testing.assert_close(found, weight, rtol=0.2, atol=0.2)


def test_zero_stays_zero_and_codes_stay_within_the_width():
    torch.manual_seed(0)
    weight = torch.randn(1000)
    weight[::3] = 0

    codes = nearest_codes(weight * 10, fit_codebook(weight, 4))

    assert codes.dtype == torch.int8
    assert (codes.min(), codes.max()) == (-7, 7)
    assert (codes[::3] == 0).all()


def test_values_move_to_the_weighted_mean_of_their_weights():
    codebook = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]])
    weight = torch.tensor([0.9, 1.3, -2.0, 0.0, 0.1])
    importance = torch.tensor([1.0, 3.0, 1.0, 5.0, 1.0])

    moved = refit_codebook(weight, nearest_codes(weight, codebook), codebook, importance)

    assert moved.tolist() == [[-2.0, -1.0, -0.5, 0.0, 0.5, torch.tensor(1.2).bfloat16().item(), 2.0]]


def layers():
    torch.manual_seed(0)
    weights = {"a": torch.randn(8, 20), "b": torch.randn(6, 30) * 0.3}
    ones = {name: torch.ones_like(each) for name, each in weights.items()}
    sensitivity = {"a": torch.full((8, 20), 100.0), "b": ones["b"]}
    return weights, ScoreMap(ones, ones, sensitivity, 1)


def test_allocation_gives_sensitive_layers_more_values():
    weights, scores = layers()

    found = allocate_bits(weights, scores, average_bits=4.0, bits=(2, 4, 6), bits_per="layer", quantizer="codebook")

    assert found.allocation["a"].unique().tolist() == [6]
    assert found.allocation["b"].unique().tolist() == [2]
    assert {name: each.shape for name, each in found.codebooks.items()} == {"a": (1, 63), "b": (1, 3)}
    assert all((scale == 1).all() for scale in found.scales.values())
    expected = sum(error(weights[name], found.codebooks[name], scores.sensitivity[name]) for name in weights)
    assert found.cost == pytest.approx(expected, rel=1e-5)


def test_without_scores_errors_alone_count():
    weights, _ = layers()

    found = measure_widths(weights, None, bits=(3,), bits_per="layer", quantizer="codebook").choose(3.0)

    assert torch.equal(found.codebooks["a"], fit_codebook(weights["a"], 3))


def test_codebooks_of_blocks_are_paid_for():
    weights, scores = layers()
    settings = {"bits": (2, 4), "bits_per": "layer", "quantizer": "codebook"}

    def price(codes, width):
        return {name: torch.full((len(each),), float(width * each[0].numel())) for name, each in codes.items()}

    costs = [
        measure_widths(weights, scores, price=price, codebook_channels=channels, **settings) for channels in (None, 4)
    ]
    one, several = (each.choose(4.0) for each in costs)

    assert {name: len(each) for name, each in several.codebooks.items()} == {"a": 2, "b": 1}  # 4 does not divide 6
    assert several.cost < one.cost
    assert costs[0].price.tolist() == [[160 * 2 + 3 * 16, 160 * 4 + 15 * 16], [180 * 2 + 3 * 16, 180 * 4 + 15 * 16]]
    assert (costs[1].price - costs[0].price).tolist() == [[3 * 16, 15 * 16], [0, 0]]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"quantizer": "codebook", "bits_per": "layer", "codebook_channels": 0},
            "codebook_channels must be >= 1, got 0",
        ),
        (
            {"quantizer": "codebook"},
            "quantizer='codebook' has one codebook a layer: use bits_per='layer', not 'channel'",
        ),
        ({"quantizer": "log"}, "quantizer must be 'uniform' or 'codebook', got 'log'"),
    ],
)
def test_other_quantizers_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        allocate_bits(layers()[0], None, average_bits=4.0, **settings)


@pytest.mark.parametrize(
    ("codebook", "text"),
    [
        (
            torch.tensor([[-1.0, 0.0, 1.0, 2.0]]),
            r"has codebooks of shape \(1, 4\), 2 channels and widths \[2\]: expected",
        ),
        (torch.tensor([-1.0, 0.0, 1.0]), r"has codebooks of shape \(3,\)"),
        (torch.tensor([[-1.0, 0.0, 1.0]] * 3), r"has codebooks of shape \(3, 3\), 2 channels"),
        (torch.zeros(0, 3), r"has codebooks of shape \(0, 3\)"),
        (torch.tensor([[-1.0, 0.5, 1.0]]), "must rise, with zero in the middle"),
        (torch.tensor([[-1.0, 0.0, 1.0], [1.0, 0.0, -1.0]]), "must rise, with zero in the middle"),
    ],
)
def test_a_plan_refuses_what_is_no_codebook(codebook, text):
    bits = {"a": torch.tensor([2, 2], dtype=torch.uint8)}
    scales = {"a": torch.ones(2)}

    with pytest.raises(ValueError, match=text):
        CompressionPlan(Mask({}), BitAllocation(bits, {"a": 3}), scales, codebooks={"a": codebook})
    with pytest.raises(ValueError, match="b has a codebook, but no bit width"):
        CompressionPlan(Mask({}), BitAllocation(bits, {"a": 3}), scales, codebooks={"b": torch.zeros(1, 3)})
