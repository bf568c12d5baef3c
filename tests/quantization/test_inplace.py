"""Weights put onto their grids in place, against torchao's way of doing it."""

import pytest
import torch

from lightning_xai_compress.quantization import inplace, mask_, quantize, refit_scales, requantize_

BITS = torch.tensor([2, 3, 4, 5, 6, 7, 8] * 3, dtype=torch.uint8)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights(kind, *shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(BITS), *shape, generator=generator)
    scale = weight.flatten(1).abs().amax(1) / 2.0 ** (BITS.float() - 1)
    if kind == "huge":
        weight, scale = weight * 1e30, scale * 1e30
    elif kind == "tiny":
        weight, scale = weight * 1e-30, scale * 1e-30
    elif kind == "outliers":
        weight = weight * (torch.rand(weight.shape, generator=generator) * 12 - 8).exp2()
    elif kind == "between two codes":  # half-way cases round to the even one, and below zero to no negative zero
        scale = scale.bfloat16().float()
        weight = (torch.randint(-300, 300, weight.shape, generator=generator) / 2) * scale.view(-1, *[1] * len(shape))
    elif kind == "zeros":
        weight[::3] = 0.0
        weight[1::3, ::2] = -0.0
        scale[::2] = 0.0
    return weight, scale.bfloat16().float()


def same_bits(one, other):
    return torch.equal(one.view(INTEGERS[one.element_size()]), other.view(INTEGERS[other.element_size()]))


@pytest.mark.parametrize("block", [1, 100, 2**17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "huge", "tiny", "outliers", "between two codes", "zeros"])
def test_in_place_and_in_blocks_is_torchao_bit_for_bit(kind, dtype, block, monkeypatch):
    monkeypatch.setattr(inplace, "_BLOCK", block)
    weight, scale = weights(kind, 5, 3, 3)
    if dtype == torch.float16 and kind in ("huge", "tiny"):
        weight, scale = (each / 1e30 * 1e4 if kind == "huge" else each * 1e30 * 1e-5 for each in (weight, scale))
        scale = scale.bfloat16().float()
    weight = weight.to(dtype)
    stepped, latent = weight.clone(), torch.full_like(weight, torch.nan)

    fitted = requantize_(stepped, latent, BITS, scale)

    assert same_bits(latent, weight)
    assert torch.equal(fitted, refit_scales(weight, BITS, scale))
    assert same_bits(stepped, quantize(weight, BITS, fitted))
    if kind in ("random", "between two codes"):
        assert not torch.equal(fitted, scale)
        assert stepped.float().unique().numel() > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("refit", [False, True])
def test_masked_in_the_same_run_is_masked_before(dtype, refit, monkeypatch):
    monkeypatch.setattr(inplace, "_BLOCK", 100)
    weight, scale = weights("random", 5, 3, 3)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    weight = weight.to(dtype)
    weight[0, 0, 0, 0], keep[0, 0, 0, 0] = torch.inf, False
    expected = weight.masked_fill(~keep, 0.0)
    stepped, latent = weight.clone(), torch.full_like(weight, torch.nan)

    fitted = requantize_(stepped, latent, BITS, scale, keep=keep, refit=refit)

    assert same_bits(latent, expected)
    assert torch.equal(fitted, refit_scales(expected, BITS, scale) if refit else scale)
    assert same_bits(stepped, quantize(expected, BITS, fitted))


def arranged(how):
    """The same weights in another order of memory, or with gaps in it."""
    weight, scale = weights("random", 6, 3, 4)
    if how == "channels_last":
        return weight.to(memory_format=torch.channels_last), scale
    if how == "input channels first":
        return weight.transpose(0, 1).contiguous().transpose(0, 1), scale
    gaps = torch.zeros(len(BITS), 6, 3, 8)
    gaps[..., ::2] = weight
    return gaps[..., ::2], scale


@pytest.mark.parametrize("how", ["channels_last", "input channels first", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_order_of_memory_gives_the_same_grid(how, dtype):
    weight, scale = arranged(how)
    stepped = weight.detach().to(dtype) if dtype != torch.float32 else weight
    expected, latent = stepped.clone(), torch.zeros_like(stepped)

    fitted = requantize_(stepped, latent, BITS, scale)

    plain = refit_scales(expected.contiguous(), BITS, scale)
    torch.testing.assert_close(fitted, plain, rtol=2**-7, atol=0)  # a sum in another order may round to the next
    assert torch.equal(fitted, refit_scales(expected, BITS, scale))
    assert torch.equal(latent, expected)
    assert torch.equal(stepped, quantize(expected, BITS, fitted))


@pytest.mark.parametrize("block", [1, 2**17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masking_is_masked_fill_and_makes_zero_of_infinity_and_nan(dtype, block, monkeypatch):
    monkeypatch.setattr(inplace, "_BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(7, 5, 3, generator=generator).to(dtype)
    tensor.view(-1)[:40:4] = torch.inf
    tensor.view(-1)[1:40:4] = torch.nan
    keep = torch.rand(7, 5, 3, generator=generator) > 0.5
    expected = tensor.masked_fill(~keep, 0.0)

    mask_(tensor, keep)

    torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)
    assert not tensor[~keep].signbit().any()
    assert tensor[keep].isnan().any()


def test_masking_follows_the_shape_and_not_the_memory():
    tensor = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    keep = torch.rand(4, 3, 5, 2, generator=torch.Generator().manual_seed(1)) > 0.5
    expected = tensor.masked_fill(~keep, 0.0)

    mask_(tensor, keep)

    assert torch.equal(tensor, expected)
