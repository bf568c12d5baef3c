"""Grids and bit widths, against torchao itself, hand-worked values and brute force."""

from itertools import product

import pytest
import torch
from torchao.quantization import choose_qparams_affine, dequantize_affine, quantize_affine
from torchao.quantization.quant_primitives import MappingType

from lightning_xai_compress import BitAllocation, ScoreMap, allocate_bits
from lightning_xai_compress.quantization import fit_scales, quantize, refit_scales


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_grid_of_two_bits_has_three_values():
    values = quantize(torch.tensor([[-3.0, -0.6, -0.4, 0.0, 0.4, 0.6, 3.0]]), torch.tensor([2]), torch.tensor([1.0]))

    assert values.tolist() == [[-1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0]]


def test_a_grid_of_three_bits_by_hand():
    values = quantize(torch.tensor([[-9.0, 0.3, 0.8, 1.3, 9.0]]), torch.tensor([3]), torch.tensor([0.5]))

    assert values.tolist() == [[-1.5, 0.5, 1.0, 1.5, 1.5]]


@pytest.mark.parametrize("width", range(2, 9))
def test_mixed_widths_equal_torchao_channel_by_channel(width):
    weight = weights(6, 4, 3, 3)
    bits = torch.tensor([2, 3, 4, 6, 8, width], dtype=torch.uint8)
    scale = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.5 / width]).bfloat16().float()

    values = quantize(weight, bits, scale)

    for channel in range(6):
        limit = 2 ** (int(bits[channel]) - 1) - 1
        row = weight[channel].reshape(1, -1)
        arguments = ((1, row.shape[1]), scale[channel : channel + 1], torch.zeros(1))
        codes = quantize_affine(row, *arguments, torch.int8, -limit, limit)
        expected = dequantize_affine(codes, *arguments, torch.int8, -limit, limit)
        assert torch.equal(values[channel].reshape(1, -1), expected)


def test_zeros_stay_zeros_and_a_scale_of_zero_is_a_channel_of_zeros():
    weight = weights(3, 8)
    weight[0, ::2] = 0.0

    values = quantize(weight, torch.tensor([2, 4, 8]), torch.tensor([0.5, 0.25, 0.0]))

    assert (values[0, ::2] == 0).all()
    assert (values[2] == 0).all()
    assert (values[1] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_values_keep_their_type_and_are_codes_times_scale(dtype):
    weight = weights(2, 8).to(dtype)
    scale = torch.tensor([0.3, 0.2]).bfloat16().float()

    values = quantize(weight, torch.tensor([4, 4]), scale)

    assert values.dtype == dtype
    codes = (values.float() / scale.unsqueeze(1)).round()
    assert torch.equal((codes * scale.unsqueeze(1)).to(dtype), values)
    assert codes.abs().max() <= 7


@pytest.mark.parametrize(("width", "slack"), [(2, 1.01), (3, 1.01), (4, 1.02), (6, 1.1), (8, 1.3)])
def test_fitted_scales_have_less_error_than_torchaos_range_and_are_near_the_best(width, slack):
    weight = weights(8, 200)
    scale, error = fit_scales(weight, width)

    limit = 2 ** (width - 1) - 1
    symmetric = MappingType.SYMMETRIC_NO_CLIPPING_ERR
    theirs, zero = choose_qparams_affine(weight, symmetric, (1, 200), torch.int8, -limit, limit)
    codes = quantize_affine(weight, (1, 200), theirs, zero, torch.int8, -limit, limit)
    back = dequantize_affine(codes, (1, 200), theirs, zero, torch.int8, -limit, limit)
    fine = torch.stack(
        [
            (quantize(weight, torch.full((8,), width), scale * factor) - weight).square().sum(1)
            for factor in torch.linspace(0.5, 2.0, 301)
        ]
    ).amin(0)
    assert error.sum() < (back - weight).square().sum()
    assert (error.sum(1) <= slack * fine).all()  # on fine grids the rounding of the scale shows
    assert torch.equal(scale, scale.bfloat16().float())


def test_refitting_never_raises_the_error():
    weight, bits = weights(6, 50), torch.tensor([2, 2, 3, 3, 4, 8])
    scale = torch.full((6,), 0.3).bfloat16().float()

    def error(scale):
        return (quantize(weight, bits, scale) - weight).square().sum(1)

    refitted = refit_scales(weight, bits, scale)

    assert (error(refitted) <= error(scale) * 1.001).all()  # bfloat16 rounds the optimum by up to 0.2 %
    assert (error(refitted) < 0.99 * error(scale)).any()


def test_an_all_zero_channel_has_scale_zero():
    weight = weights(2, 8)
    weight[1] = 0.0

    scale, error = fit_scales(weight, 3)

    assert scale[1] == 0
    assert error[1].sum() == 0
    assert refit_scales(weight, torch.tensor([3, 3]), scale)[1] == 0


def score_map(sensitivity):
    return ScoreMap(sensitivity, sensitivity, sensitivity, samples=1)


def test_the_most_relevant_of_three_channels_gets_the_bits():
    """Same weights in all channels, sensitivities 1, 100, 1: the budget of 8 + 2 + 2 goes to the middle."""
    weight = {"fc": weights(1, 16).repeat(3, 1)}
    sensitivity = {"fc": torch.tensor([1.0, 100.0, 1.0]).unsqueeze(1).expand(3, 16)}

    allocation = allocate_bits(weight, score_map(sensitivity), average_bits=4.0, bits=(2, 8)).allocation

    assert allocation["fc"].tolist() == [2, 8, 2]
    assert allocation.average_bits == 4.0


@pytest.mark.parametrize("seed", range(4))
def test_allocation_is_near_the_best_of_all_and_within_budget(seed):
    weight = {"a": weights(3, 12, seed=seed), "b": weights(3, 2, 2, 2, seed=seed + 10)}
    generator = torch.Generator().manual_seed(seed)
    sensitivity = {name: torch.rand(tensor.shape, generator=generator) ** 4 for name, tensor in weight.items()}
    widths = (2, 3, 4, 6)

    allocation = allocate_bits(weight, score_map(sensitivity), average_bits=3.2, bits=widths).allocation

    errors = {
        (name, width): (fit_scales(weight[name], width)[1] * sensitivity[name]).flatten(1).sum(1)
        for name in weight
        for width in widths
    }

    def cost(choice):
        return sum(
            float(errors[name, width][channel])
            for (name, channel), width in zip([(n, c) for n in "ab" for c in range(3)], choice, strict=True)
        )

    sizes = [12, 12, 12, 8, 8, 8]
    feasible = [
        choice
        for choice in product(widths, repeat=6)
        if sum(s * w for s, w in zip(sizes, choice, strict=True)) <= 3.2 * 60
    ]
    best = min(map(cost, feasible))
    ours = [*allocation["a"].tolist(), *allocation["b"].tolist()]
    assert allocation.average_bits <= 3.2
    assert cost(ours) <= 1.1 * best


def test_channels_of_unknown_relevance_get_the_largest_width():
    weight = {"a": weights(2, 8), "b": weights(6, 8)}
    sensitivity = {"a": torch.full((2, 8), torch.nan), "b": torch.ones(6, 8)}

    allocation = allocate_bits(weight, score_map(sensitivity), average_bits=4.0, bits=(2, 4, 8)).allocation

    assert allocation["a"].tolist() == [8, 8]
    assert allocation.average_bits <= 4.0


def test_a_budget_that_is_just_enough_ends():
    weight = {"a": weights(1, 1), "b": weights(1, 22)}
    sensitivity = {"a": torch.full((1, 1), torch.nan), "b": torch.ones(1, 22)}

    allocation = allocate_bits(weight, score_map(sensitivity), average_bits=2.260869565217391, bits=(2, 8)).allocation

    assert (allocation["a"].tolist(), allocation["b"].tolist()) == ([8], [2])


def test_weights_unknown_in_a_layer_that_is_known_otherwise_count_as_its_mean():
    torch.manual_seed(0)
    weight = {"a": weights(6, 8), "b": weights(6, 8)}
    known = torch.rand(6, 8)
    known[2:5] = torch.nan
    filled = torch.where(known.isnan(), known.nanmean(), known)
    others = torch.rand(6, 8)

    allocation = allocate_bits(weight, score_map({"a": known, "b": others}), average_bits=4.0).allocation
    expected = allocate_bits(weight, score_map({"a": filled, "b": others}), average_bits=4.0).allocation

    assert torch.equal(allocation["a"], expected["a"])
    assert torch.equal(allocation["b"], expected["b"])
    assert int(allocation["a"][2:5].max()) < 8


def test_a_budget_that_unknown_channels_exceed_is_refused():
    weight = {"a": weights(6, 8), "b": weights(2, 8)}
    sensitivity = {"a": torch.full((6, 8), torch.nan), "b": torch.ones(2, 8)}

    with pytest.raises(ValueError, match=r"6 channels of unknown relevance keep 8 bits, .* the mean 6.50"):
        allocate_bits(weight, score_map(sensitivity), average_bits=4.0, bits=(2, 4, 8))


@pytest.mark.parametrize(
    ("bits", "average", "text"),
    [
        ((2, 4), 1.5, r"average_bits must lie between .* bits=\(2, 4\), got 1.5"),
        ((2, 4), 4.5, r"average_bits must lie between .* got 4.5"),
        ((1, 4), 3.0, r"whole numbers in 2..8, got \(1, 4\)"),
        ((4, 9), 4.0, r"whole numbers in 2..8, got \(4, 9\)"),
        ((2.5, 4), 3.0, "each of bits must be a whole number, got 2.5"),
        ((), 3.0, "at least one width"),
    ],
)
def test_budgets_and_widths_out_of_range_are_refused(bits, average, text):
    with pytest.raises(ValueError, match=text):
        allocate_bits({"fc": weights(2, 4)}, score_map({"fc": torch.ones(2, 4)}), average_bits=average, bits=bits)


def test_average_bits_weighs_channels_by_their_size():
    bits = {"a": torch.tensor([2, 2], dtype=torch.uint8), "b": torch.tensor([8], dtype=torch.uint8)}

    assert BitAllocation(bits, {"a": 3, "b": 6}).average_bits == pytest.approx((2 * 6 + 8 * 6) / 12)
