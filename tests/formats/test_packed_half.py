import json
import math
import zlib

import pytest
import torch
from torch import nn

from lightning_xai_compress.formats.packed import load_compressed, pack, packed_size
from lightning_xai_compress.formats.rounding import round_to_float16
from lightning_xai_compress.plan import CompressionPlan, Mask

from packed_nets import Net, assert_same, compressed, round_trip

PLAN = CompressionPlan(Mask({}))


def holding(**values):
    model = nn.Module()
    for name, value in values.items():
        model.register_buffer(name, value)
    return model


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist()


def held(data):
    """What the index says about a dtype of the numbers in the file."""
    with_header = 8 + int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8:with_header])["index"]["data_offsets"]
    index = json.loads(zlib.decompress(data[with_header + start : with_header + end]))
    return [row[4:] for row in index["tensors"]]


def rest(model, plan=PLAN):
    return packed_size(model, plan).rest


HALVES = torch.randn(4000, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_that_float16_holds_take_two_bytes(tmp_path, dtype):
    model = holding(values=HALVES.to(dtype))

    state = round_trip(model, PLAN, tmp_path / "m")

    assert state["values"].dtype == dtype
    assert bits(state["values"]) == bits(model.values)
    assert held(pack(model, PLAN)) == [["float16"]]
    assert 0.85 * 2 * 4000 < rest(model) <= 2 * 4000
    assert rest(model) == rest(holding(values=HALVES))


@pytest.mark.parametrize(
    "value",
    [1 + 2**-11, 65520.0, 2**-25, 2.0**-14 * (1 + 2**-11), 1e-45, math.nan, -math.nan, 2**-24 * 1.5],
)
def test_one_number_that_float16_does_not_hold_keeps_its_tensor_whole(tmp_path, value):
    values = HALVES.float()
    values[17] = value
    model = holding(values=values)

    state = round_trip(model, PLAN, tmp_path / "m")

    assert bits(state["values"]) == bits(values)
    assert held(pack(model, PLAN)) == [[]]


@pytest.mark.parametrize("value", [-0.0, math.inf, -math.inf, 65504.0, 2.0**-24, -(2.0**-14), 0.0])
def test_what_float16_holds_comes_back_to_the_bit(tmp_path, value):
    values = HALVES.float()
    values[17] = value
    model = holding(values=values)

    assert bits(round_trip(model, PLAN, tmp_path / "m")["values"]) == bits(values)
    assert held(pack(model, PLAN)) == [["float16"]]


def test_tensors_are_judged_one_by_one(tmp_path):
    model = holding(
        exact=HALVES.float(),
        rough=torch.randn(500),
        scalar=torch.tensor(0.5),
        wide=torch.randn(30, dtype=torch.float64),
        none=torch.empty(0, 2),
        count=torch.tensor(7),
    )

    state = round_trip(model, PLAN, tmp_path / "m")

    assert held(pack(model, PLAN)) == [["float16"], [], ["float16"], [], [], []]
    for name, value in model.state_dict().items():
        assert state[name].shape == value.shape
        assert bits(state[name]) == bits(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_pruning_kept_is_judged_without_its_zeros(tmp_path, dtype):
    keep = torch.rand(40, 100) < 0.4
    model = holding(values=(HALVES.view(40, 100) * keep).to(dtype))
    plan = CompressionPlan(Mask({"values": keep}))

    state = round_trip(model, plan, tmp_path / "m")

    assert bits(state["values"] + 0.0) == bits(model.values + 0.0)
    assert held(pack(model, plan)) == [["float16"] if dtype in (torch.float32, torch.float64) else []]
    assert rest(model, plan) <= 2 * int((model.values != 0).sum())


def test_a_large_tensor_spans_several_chunks(tmp_path):
    generator = torch.Generator().manual_seed(0)
    model = holding(
        a=torch.randn(1_500_000, generator=generator),
        b=torch.randn(1_500_000, generator=generator).half().float(),
        c=torch.randn(1200, 1000, generator=generator).half().float(),
        d=torch.randn(1200, 1000, generator=generator),
    )
    keep = {name: torch.rand(1200, 1000, generator=generator) < 0.9 for name in "cd"}
    for name in "cd":
        getattr(model, name).mul_(keep[name])

    assert_same(round_trip(model, CompressionPlan(Mask(keep)), tmp_path / "m"), model)


def test_rounding_moves_no_value_by_more_than_half_a_step():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.copy_(torch.linspace(-60000, 60000, 24))
        model.norm.running_var.copy_(torch.logspace(-14, 15, 24, base=2.0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    assert round_to_float16(model, []) == []

    moved = False
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert bool(((tensor - before[name]).abs() <= 2**-11 * before[name].abs()).all())
        assert torch.equal(tensor.half().to(tensor.dtype), tensor)
        moved |= not torch.equal(tensor, before[name])
    assert moved


def test_tiny_biases_do_not_keep_their_layer_from_float16():
    model = Net()
    tiny = torch.tensor([3e-8, -7e-6, 1e-10])
    with torch.no_grad():
        model.norm.bias.copy_(torch.linspace(-1, 0.7, 24))
        model.norm.bias[:3] = model.norm.weight[:3] = tiny
        model.conv.bias.fill_(1e-9)  # all of them: there is nothing next to which they would be small
    norm, conv = model.norm.bias.clone(), model.conv.bias.clone()

    skipped = round_to_float16(model, [])

    assert {entry.name: entry.reason for entry in skipped} == {
        "norm.weight": "3 of 24 values are too large or too small for float16: not rounded to it",
        "conv.bias": f"{len(conv)} of {len(conv)} values are too large or too small for float16: not rounded to it",
    }
    assert torch.equal(model.norm.bias.half().float(), model.norm.bias)
    assert not torch.equal(model.norm.bias, norm)
    assert (model.norm.bias - norm).abs().max() <= 2**-11 * norm.abs().max()
    assert torch.equal(model.conv.bias, conv)


def test_rounding_twice_is_rounding_once():
    model = compressed()[0]
    round_to_float16(model, [])
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    assert round_to_float16(model, []) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, once[name])


def test_a_rounded_model_takes_less_and_comes_back_exactly(tmp_path):
    model, plan = compressed()
    with torch.no_grad():
        model.norm.weight.normal_()
    whole = packed_size(model, plan)
    quantized = {name: model.get_parameter(name).clone() for name in plan.allocation.bits}

    round_to_float16(model, list(plan.allocation.bits))

    (tmp_path / "m").write_bytes(pack(model, plan))
    assert_same(load_compressed(tmp_path / "m"), model)
    assert packed_size(model, plan).rest < 0.65 * whole.rest
    for name, tensor in quantized.items():
        assert torch.equal(model.get_parameter(name), tensor)


def test_names_to_leave_stay_with_all_that_shares_their_tensor():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    before = model[0].weight.clone()
    bias = model[0].bias.clone()

    assert round_to_float16(model, ["1.weight"]) == []

    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[0].bias, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [70000.0, -1e30, 1e-9, 2.0**-20 * 1.25 + 2.0**-25])
def test_tensors_that_would_become_infinite_or_lose_digits_stay_and_are_named(dtype, value):
    model = holding(fine=torch.tensor([1.1, 3.3], dtype=dtype), off=torch.tensor([1.1, value, 3.3], dtype=dtype))
    before = model.off.clone()

    skipped = round_to_float16(model, [])

    assert [entry.name for entry in skipped] == ["off"]
    assert "1 of 3 values are too large or too small for float16" in skipped[0].reason
    assert torch.equal(model.off, before)
    assert torch.equal(model.fine.half().to(dtype), model.fine)


def test_what_is_not_finite_stays_as_it_is_beside_rounded_values():
    model = holding(values=torch.tensor([math.nan, math.inf, -math.inf, 1.1, -0.0, 2.0**-24]))

    assert round_to_float16(model, []) == []
    assert bits(model.values[[0, 1, 2, 4, 5]]) == bits(torch.tensor([math.nan, math.inf, -math.inf, -0.0, 2.0**-24]))
    assert model.values[3] == torch.tensor(1.1).half().float()


def test_tensors_of_which_numbers_share_memory_stay_and_are_named():
    model = holding(values=torch.tensor([1.1]).expand(3))

    assert [entry.name for entry in round_to_float16(model, [])] == ["values"]
    assert model.values[0] == torch.tensor(1.1)


def test_parameters_keep_their_identity_and_gradients():
    model = nn.Linear(3, 3)
    weight = model.weight
    round_to_float16(model, [])

    assert model.weight is weight
    assert weight.requires_grad
    assert weight.is_leaf
