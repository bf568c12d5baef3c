"""Activations on 8 bits while training."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_xai_compress.quantization import FakeActivations, fake_quantize, quantizable


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.3, 2.9), (-4.0, 0.0), (-1e-3, 1e4)])
def test_values_are_those_of_an_integer_kernel(low, high):
    values = torch.linspace(2 * low - 1, 2 * high + 1, 4001)

    got = fake_quantize(values, low, high).numpy()

    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    codes = np.clip(np.rint(values.numpy() / scale) + zero, 0, 255)
    np.testing.assert_allclose(got, (codes - zero) * scale, atol=float(scale) * 1e-3)
    assert len(np.unique(got)) <= 256
    assert fake_quantize(torch.zeros(3), low, high).tolist() == [0.0, 0.0, 0.0]


def test_gradients_pass_inside_the_range_alone():
    values = torch.tensor([-3.0, -0.9, 0.2, 1.7, 5.0], requires_grad=True)

    fake_quantize(values, -1.0, 2.0).sum().backward()

    assert values.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays(dtype):
    assert fake_quantize(torch.ones(2, dtype=dtype), 0.0, 2.0).dtype == dtype


def test_a_range_of_nothing_leaves_values_alone():
    values = torch.randn(4)

    assert fake_quantize(values, 0.0, 0.0) is values


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 4))


def test_layers_read_rounded_inputs_once_ranges_are_measured():
    model, x = net(), torch.randn(8, 2, 5)
    plain = model(x)
    fake = FakeActivations(quantizable(model, ["0.weight", "3.weight"]))
    assert torch.equal(model(x), plain)  # nothing is known yet

    with fake.measuring():
        assert torch.equal(model(x), plain)
        model(3 * x)

    hidden = torch.relu(model[0](x))
    assert fake.ranges["0"] == (float((3 * x).min()), float((3 * x).max()))
    assert fake.ranges["3"][0] == 0.0
    expected = model[3](hidden.flatten(1))
    assert torch.equal(model(x), expected)
    assert not torch.equal(expected, plain)
    by_hand = nn.functional.conv1d(fake_quantize(x, *fake.ranges["0"]), model[0].weight, model[0].bias).relu()
    by_hand = fake_quantize(by_hand.flatten(1), *fake.ranges["3"]) @ model[3].weight.T + model[3].bias
    torch.testing.assert_close(model(x), by_hand)
    with fake.paused():
        assert torch.equal(model(x), plain)


def test_the_model_is_as_it_was_afterwards():
    model, x = net(), torch.randn(8, 2, 5)
    plain = model(x)
    fake = FakeActivations(quantizable(model, ["0.weight", "3.weight"]))
    with fake.measuring():
        model(x)

    fake.detach()
    fake.detach()

    assert torch.equal(model(x), plain)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_values_that_are_not_finite_and_tokens_leave_no_range():
    model = nn.Sequential(nn.Linear(2, 2))
    fake = FakeActivations(quantizable(model, ["0.weight"]))

    with fake.measuring():
        model(torch.tensor([[float("inf"), 1.0], [float("nan"), -2.0]]))

    assert fake.ranges == {"0": (-2.0, 1.0)}


def test_only_compressed_linear_and_convolution_layers_are_watched():
    model = nn.ModuleDict(
        {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Embedding(3, 2), "d": nn.Conv2d(1, 1, 1)}
    )

    assert list(quantizable(model, ["a.weight", "c.weight", "d.weight"])) == ["a", "d"]
