"""Groups of input channels with a grid each, against torchao group by group."""

import pytest
import torch

from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask, by_rows
from lightning_xai_compress.quantization import fit_scales, inplace, quantize, refit_scales, requantize_

BITS = torch.tensor([2, 8, 3, 7, 4, 6, 5, 2, 8, 3, 6, 4], dtype=torch.uint8)  # of 4 channels in 3 groups
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def weight_and_scale(*rest, channels=4):
    weight = torch.randn(channels, 6, *rest, generator=torch.Generator().manual_seed(0))
    scale = torch.cat([part.abs().amax().view(1) for part in parts_of(weight, len(BITS) // channels)])
    return weight, (scale / (2.0 ** (BITS.float() - 1) - 0.5)).bfloat16().float()


def parts_of(weight, groups):
    """The groups one by one: all of the first channel, all of the second one, and so on."""
    size = weight.shape[1] // groups
    return [channel[first : first + size] for channel in weight for first in range(0, weight.shape[1], size)]


def same_bits(one, other):
    return torch.equal(one.view(INTEGERS[one.element_size()]), other.view(INTEGERS[other.element_size()]))


def test_each_group_has_its_own_step_by_hand():
    weight = torch.tensor([[0.3, -0.9, 30.0, -80.0], [5.0, 0.4, 0.0, 0.26]])
    bits, scale = torch.tensor([2, 3, 2, 8], dtype=torch.uint8), torch.tensor([0.5, 20.0, 1.0, 0.25])

    values = quantize(weight, bits, scale)

    assert values.tolist() == [[0.5, -0.5, 40.0, -60.0], [1.0, 0.0, 0.0, 0.25]]


def test_rows_are_groups_of_consecutive_input_channels():
    weight = torch.arange(2 * 4 * 3).view(2, 4, 3)

    rows = by_rows(weight, 4)

    assert rows.shape == (4, 2, 3)
    assert rows[1].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert by_rows(weight, 2) is weight


@pytest.mark.parametrize(
    ("shape", "rows"), [((4, 6), 3), ((4, 6), 6), ((4, 6), 0), ((4, 6), -8), ((4, 6), 16), ((4, 6), 48), ((4,), 8)]
)
def test_rows_that_do_not_divide_the_weight_are_refused(shape, rows):
    with pytest.raises(ValueError, match=rf"cannot be cut into {rows} rows: expected one row a channel \(4\), or that"):
        by_rows(torch.zeros(shape), rows)


@pytest.mark.parametrize("rest", [(), (3, 3)], ids=["linear", "conv"])
def test_groups_equal_torchao_group_by_group(rest):
    weight, scale = weight_and_scale(*rest)

    values, refitted = quantize(weight, BITS, scale), refit_scales(weight, BITS, scale)

    for row, (part, value) in enumerate(zip(parts_of(weight, 3), parts_of(values, 3), strict=True)):
        own = BITS[row : row + 1], scale[row : row + 1]
        assert torch.equal(value, quantize(part.reshape(1, -1), *own).view_as(part))
        assert torch.equal(refitted[row : row + 1], refit_scales(part.reshape(1, -1), *own))
    assert values.shape == weight.shape
    assert not torch.equal(refitted, scale)


def arranged(how, weight):
    if how == "channels_last":
        return weight.to(memory_format=torch.channels_last)
    if how == "input channels first":
        return weight.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "gaps":
        return torch.zeros(*weight.shape[:-1], 2 * weight.shape[-1]).to(weight.dtype)[..., ::2].copy_(weight)
    return weight.clone()


@pytest.mark.parametrize("channels", [4, 2, 1])
@pytest.mark.parametrize("how", ["contiguous", "channels_last", "input channels first", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("refit", [True, False])
def test_in_place_is_the_same_bit_for_bit_in_any_order_of_memory(channels, how, dtype, refit, monkeypatch):
    monkeypatch.setattr(inplace, "_BLOCK", 20)
    weight = torch.randn(channels, 12, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = (torch.stack([part.abs().max() for part in parts_of(weight, 12 // channels)]) / 5).bfloat16().float()
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.4
    expected = weight.masked_fill(~keep, 0.0)
    stepped = arranged(how, weight)
    strides, latent = stepped.stride(), torch.full_like(stepped, torch.nan)
    kept = torch.empty_like(stepped, dtype=torch.bool).copy_(keep)

    fitted = requantize_(stepped, latent, BITS, scale, keep=kept, refit=refit)

    assert stepped.stride() == strides
    assert same_bits(latent.contiguous(), expected)
    assert torch.equal(fitted, refit_scales(arranged(how, expected), BITS, scale) if refit else scale)
    assert same_bits(stepped.contiguous(), quantize(expected, BITS, fitted))
    assert torch.equal(fitted, scale) != refit


def test_scales_fitted_to_rows_have_less_error_than_those_of_whole_channels():
    weight = weight_and_scale(3, 3)[0] * torch.tensor([1.0, 1, 10, 10, 0.1, 0.1]).view(1, 6, 1, 1)

    scale, error = fit_scales(by_rows(weight, 12), 4)

    bits = torch.full((12,), 4, dtype=torch.uint8)
    values = quantize(weight, bits, scale)
    torch.testing.assert_close(error.view_as(weight), (values - weight).square())
    assert error.sum() < 0.6 * fit_scales(weight, 4)[1].sum()


def test_an_allocation_counts_rows_by_their_size():
    allocation = BitAllocation({"w": torch.tensor([2, 4, 8, 2], dtype=torch.uint8)}, {"w": 3})

    assert allocation.average_bits == 4.0


def test_plans_that_do_not_hold_together_are_refused():
    bits = {"w": torch.tensor([2, 4], dtype=torch.uint8)}

    with pytest.raises(ValueError, match=r"name different parameters: \['v', 'w'\]"):
        BitAllocation(bits, {"v": 3})
    with pytest.raises(ValueError, match=r"bit widths of w must have shape \[rows\], got \(2, 1\)"):
        BitAllocation({"w": bits["w"].view(2, 1)}, {"w": 3})
    with pytest.raises(ValueError, match=r"a scale for each of the 2 rows of w .* got scales of shape \(3,\)"):
        CompressionPlan(Mask({}), BitAllocation(bits, {"w": 3}), {"w": torch.ones(3)})
