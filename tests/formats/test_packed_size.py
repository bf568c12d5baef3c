import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from lightning_xai_compress.formats.packed import code_entropy, pack, packed_size
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask

from packed_nets import assert_same, compressed, quantize, round_trip


def test_a_layer_pruned_to_nothing_takes_next_to_nothing(tmp_path):
    model = nn.Linear(1000, 100, bias=False)
    nn.init.zeros_(model.weight)
    plan = CompressionPlan(Mask({"weight": torch.zeros(100, 1000, dtype=torch.bool)}))

    assert_same(round_trip(model, plan, tmp_path / "m"), model)
    assert len(pack(model, plan)) < 700


@pytest.mark.parametrize(("spread", "sparsity", "width"), [(0.3, 0.9, 4), (1.0, 0.5, 8), (0.8, 0.0, 3), (1.0, 0.0, 2)])
def test_alike_channels_take_their_entropy(spread, sparsity, width):
    rng = np.random.default_rng(0)
    high = 2 ** (width - 1) - 1
    codes = np.clip(np.rint(rng.laplace(0, spread * high / 3, (512, 576))), -high, high)
    codes[rng.random(codes.shape) < sparsity] = 0
    scale = torch.from_numpy(np.exp(rng.normal(0, 0.3, 512))).to(torch.bfloat16).float()
    model = nn.Linear(576, 512, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(codes) * scale[:, None])
    plan = CompressionPlan(
        Mask({}),
        BitAllocation({"weight": torch.full((512,), width, dtype=torch.uint8)}, {"weight": 576}),
        {"weight": scale},
    )
    share = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(share * np.log2(share)).sum() * codes.size / 8

    size = packed_size(model, plan)

    assert 0.99 * entropy < size.payload < 1.01 * entropy
    assert 512 * 6 / 8 < size.scales < 0.7 * 2 * 512  # bfloat16 would take 1024 bytes


def test_unlike_channels_take_less_than_the_entropy_of_their_layer():
    model, plan = compressed(classes=300)
    rows = model.head.weight.detach().flatten(1) / plan.scales["head.weight"].clamp_min(1e-30)[:, None]
    share = np.unique(rows.round().numpy(), return_counts=True)[1] / rows.numel()
    entropy = -(share * np.log2(share)).sum() * rows.numel() / 8

    assert packed_size(model, plan).payload < entropy


def test_the_parts_of_a_size_add_up():
    model, plan = compressed()

    size = packed_size(model, plan)

    assert size.total == len(pack(model, plan)) == size.payload + size.scales + size.rest + size.metadata
    assert size.layers.keys() == {"conv.weight", "head.weight"}
    assert sum(size.layers.values()) == pytest.approx(size.payload + size.scales, abs=2)
    assert size.layers["conv.weight"] > size.layers["head.weight"] > 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_floats_are_stored_as_a_bitmap_and_what_was_kept(tmp_path, dtype):
    model = nn.Linear(200, 100, bias=False).to(dtype)
    keep = torch.rand(100, 200) < 0.1
    with torch.no_grad():
        model.weight.mul_(keep)
    plan = CompressionPlan(Mask({"weight": keep}))

    assert_same(round_trip(model, plan, tmp_path / "m"), model)
    kept = int(keep.sum())
    entropy = 20000 * -(kept / 20000 * math.log2(kept / 20000) + (1 - kept / 20000) * math.log2(1 - kept / 20000)) / 8
    size = packed_size(model, plan)
    assert size.payload < 1.01 * entropy + 30
    assert 0.7 * kept * model.weight.element_size() < size.rest <= kept * model.weight.element_size()
    assert size.layers["weight"] == pytest.approx(size.payload + size.rest, abs=2)


def layers(shapes, spreads, width, sparsity, rng):
    """Linear layers whose codes are alike in all channels of a layer, and differ from layer to layer; and the plan."""
    model = nn.Sequential()
    bits, scales, sizes, codes = {}, {}, {}, {}
    high = 2 ** (width - 1) - 1
    for i, ((rows, columns), spread) in enumerate(zip(shapes, spreads, strict=True)):
        values = np.clip(np.rint(rng.laplace(0, spread * high / 3, (rows, columns))), -high, high)
        values[rng.random(values.shape) < sparsity] = 0
        layer = nn.Linear(columns, rows, bias=False)
        name = f"{i}.weight"
        scales[name] = torch.from_numpy(np.exp(rng.normal(0, 0.3, rows))).to(torch.bfloat16).float()
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(values) * scales[name][:, None])
        model.append(layer)
        bits[name], sizes[name], codes[name] = torch.full((rows,), width, dtype=torch.uint8), columns, values
    return model, CompressionPlan(Mask({}), BitAllocation(bits, sizes), scales), codes


def entropy_of(values):
    share = np.unique(values, return_counts=True)[1] / values.size
    return float(-(share * np.log2(share)).sum() * values.size / 8)


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_one_width_for_the_whole_model_takes_its_entropy(width, sparsity):
    shapes = [(64, 576), (128, 1152), (256, 1152), (256, 512), (100, 512), (64, 64)]
    model, plan, codes = layers(shapes, (0.3, 1.0, 2.0, 0.5, 0.8, 1.3), width, sparsity, np.random.default_rng(width))

    told = code_entropy(model, plan)

    assert told == pytest.approx(sum(entropy_of(values) for values in codes.values()), rel=1e-9)
    assert packed_size(model, plan).payload <= 1.01 * told


@pytest.mark.parametrize("width", [2, 3, 4, 6, 8])
def test_a_small_model_takes_its_entropy_and_a_table(width):
    model, plan, _ = layers([(16, 30), (10, 16)], (0.8, 1.0), width, 0.5, np.random.default_rng(0))

    symbols = 2**width - 1
    assert packed_size(model, plan).payload <= 1.01 * code_entropy(model, plan) + 16 + min(symbols, 40)


def test_the_entropy_of_a_bitmap_counts_and_that_of_floats_does_not():
    model = nn.Sequential(nn.Linear(200, 100, bias=False), nn.Linear(100, 5))
    keep = torch.rand(100, 200) < 0.25
    with torch.no_grad():
        model[0].weight.mul_(keep)
    share = float(keep.float().mean())
    expected = -20000 / 8 * (share * math.log2(share) + (1 - share) * math.log2(1 - share))

    assert code_entropy(model, CompressionPlan(Mask({"0.weight": keep}))) == pytest.approx(expected, rel=1e-6)
    assert code_entropy(model, CompressionPlan(Mask({}))) == 0.0


def test_a_plain_resnet_has_little_metadata_and_takes_its_entropy():
    model = resnet18()
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    plan = quantize(model, names, sparsity=0.5, widths=(4,))

    size = packed_size(model, plan)

    assert size.payload <= 1.01 * code_entropy(model, plan)
    assert size.metadata < 0.01 * size.total
