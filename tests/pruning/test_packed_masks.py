"""Masks of a bit a weight: they come back as they went in."""

import pickle

import pytest
import torch

from lightning_xai_compress.pruning import PackedMasks


def parameter(how):
    if how == "channels_last":
        return torch.zeros(5, 3, 3, 7).to(memory_format=torch.channels_last)
    return {
        "plain": torch.zeros(4, 6),
        "odd": torch.zeros(3, 7),
        "one": torch.zeros(1, 1),
        "gaps": torch.zeros(9, 10)[:, ::3],
    }[how]


@pytest.mark.parametrize("how", ["plain", "odd", "one", "channels_last", "gaps"])
def test_a_mask_comes_back_as_it_went_in(how):
    values = parameter(how)
    masks = PackedMasks({"weight": values})
    mask = torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    assert "weight" not in masks

    masks["weight"] = mask

    assert "weight" in masks
    assert masks["weight"].dtype == torch.bool
    assert torch.equal(masks["weight"], mask)
    assert torch.equal(pickle.loads(pickle.dumps(masks))["weight"], mask)


def test_a_mask_lies_in_memory_as_its_parameter_does():
    values = parameter("channels_last")
    masks = PackedMasks({"weight": values})
    masks["weight"] = torch.ones(values.shape, dtype=torch.bool)

    assert masks["weight"].stride() == values.stride()


def test_a_mask_takes_a_bit_a_weight():
    masks = PackedMasks({"weight": torch.zeros(64, 100)})
    masks["weight"] = torch.ones(64, 100, dtype=torch.bool)

    held = {tensor.untyped_storage().nbytes() for tensor in masks._packed.values()}
    assert held == {800}


def test_masks_are_given_up_one_by_one():
    masks = PackedMasks({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)})
    masks.update(a=torch.ones(2, 2, dtype=torch.bool), b=torch.zeros(2, 2, dtype=torch.bool))

    del masks["a"]

    assert list(masks) == ["b"]
    assert len(masks) == 1


def turned(how):
    if how == "to channels_last":
        return torch.nn.Conv2d(7, 5, 3), torch.channels_last
    return torch.nn.Conv2d(7, 5, 3).to(memory_format=torch.channels_last), torch.contiguous_format


@pytest.mark.parametrize("how", ["to channels_last", "from channels_last"])
def test_a_mask_is_the_same_after_its_parameter_got_another_order_in_memory(how):
    module, order = turned(how)
    masks = PackedMasks({"weight": module.weight})
    mask = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    masks["weight"] = mask
    before = module.weight.stride()

    module.to(memory_format=order)

    assert module.weight.stride() != before
    for _ in range(2):
        assert torch.equal(masks["weight"], mask)
        assert masks["weight"].stride() == module.weight.stride()
