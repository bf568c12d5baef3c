"""The price of codes before they are packed, against the packed file itself."""

from functools import cache

import pytest
import torch
from torch import nn

from lightning_xai_compress import BitAllocation, CompressionPlan, Mask, ScoreMap
from lightning_xai_compress.formats import entropy_price, packed_size
from lightning_xai_compress.quantization import measure_widths, quantize

SHAPES = {"first": (32, 1, 3, 3), "second": (64, 32, 3, 3), "third": (100, 200), "head": (10, 100)}


@cache
def pruned(density):
    """Weights of layers whose channels are pruned unequally."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in SHAPES.items():
        share = 2 * density * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
        weights[name] = 0.1 * torch.randn(*shape, generator=generator)
        if density < 1:
            weights[name] *= torch.rand(*shape, generator=generator) < share
    return weights


def payload(weights, allocation, scales):
    values = {name: nn.Parameter(quantize(each, allocation[name], scales[name])) for name, each in weights.items()}
    keep = Mask({name: each != 0 for name, each in weights.items()})
    return packed_size(nn.ParameterDict(values), CompressionPlan(keep, allocation, scales)).payload


@cache
def table(density):
    weights = pruned(density)
    generator = torch.Generator().manual_seed(1)
    sensitivity = {
        name: 10 ** (3 * torch.rand(len(each), *[1] * (each.dim() - 1), generator=generator)).expand_as(each)
        for name, each in weights.items()
    }
    return measure_widths(weights, ScoreMap(sensitivity, sensitivity, sensitivity, 1), price=entropy_price)


@pytest.mark.parametrize("density", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("average", [2.0, 2.5, 4.0, 8.0])
def test_prices_add_up_to_the_payload_of_the_file_within_a_few_percent(density, average):
    found = table(density).choose(average)

    # The smallest files have 1.4 kB: there it matters that rows of several widths need longer labels.
    tolerance = 0.015 if density > 0.1 else 0.04
    assert found.bytes == pytest.approx(payload(pruned(density), found.allocation, found.scales), rel=tolerance)


def test_a_budget_in_bytes_leaves_less_error_than_one_in_bits_at_equal_bytes_of_the_file():
    nominal = table(0.3).choose(3.0)

    priced = table(0.3).choose(max_bytes=nominal.bytes)

    sizes = [payload(pruned(0.3), each.allocation, each.scales) for each in (nominal, priced)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.005)
    assert priced.cost < 0.95 * nominal.cost


def test_a_price_by_hand():
    """Eight rows alike of 16 codes, half zeros and a quarter of either sign: 1.5 bits a code, and a small table."""
    row = torch.tensor([0, 1, 0, -1] * 4, dtype=torch.int8)

    price = entropy_price({"fc": row.repeat(8, 1)}, 2)["fc"]

    assert price.shape == (8,)
    assert len(set(price.tolist())) == 1
    assert 16 * 1.5 < float(price[0]) < 16 * 1.5 + 32 / 8


def test_rows_of_zeros_are_nearly_free():
    codes = torch.randint(-7, 8, (40, 50), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    codes[::2] = 0

    price = entropy_price({"fc": codes}, 4)["fc"]

    assert float(price[::2].max()) < 4
    assert float(price[1::2].min()) > 50 * 3


def test_prices_follow_names_and_rows():
    """Whatever the order of layers, a row keeps its price."""
    generator = torch.Generator().manual_seed(0)
    codes = {
        "a": torch.randint(-1, 2, (6, 40), generator=generator, dtype=torch.int8),
        "b": torch.randint(-7, 8, (5, 30), generator=generator, dtype=torch.int8),
    }

    forward = entropy_price(codes, 4)
    backward = entropy_price({"b": codes["b"], "a": codes["a"].flip(0)}, 4)

    assert torch.equal(forward["b"], backward["b"])
    assert torch.equal(forward["a"], backward["a"].flip(0))
    assert float(forward["a"].mean()) / 40 < 2 < 3 < float(forward["b"].mean()) / 30


def test_nothing_costs_nothing():
    assert entropy_price({}, 4) == {}
    assert BitAllocation({}, {}).average_bits == 0
