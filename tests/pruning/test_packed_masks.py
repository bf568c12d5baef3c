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
