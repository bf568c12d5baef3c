"""The latent copy: its two states, and the ways in which an optimizer step may go wrong."""

import pytest
import torch
from torch import nn

from lightning_xai_compress import BitAllocation, LatentCopyError, Mask
from lightning_xai_compress.callbacks.latent import LatentCopy
from lightning_xai_compress.quantization import fit_scales, quantize, refit_scales

BITS = torch.tensor([2, 3, 4], dtype=torch.uint8)


def layer_and_latent(quantized=True):
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    latent = LatentCopy({"weight": layer.weight})
    latent.apply_mask(Mask({"weight": torch.rand(3, 6) > 0.4}))
    if quantized:
        scales = torch.cat([fit_scales(layer.weight.detach(), int(bits))[0][i : i + 1] for i, bits in enumerate(BITS)])
        latent.apply_bits(BitAllocation({"weight": BITS}, {"weight": 6}), {"weight": scales})
    return layer, latent


def step(layer, latent, optimizer, seed):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    latent.before_step(optimizer)
    optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.05, foreach=True),
        lambda p: torch.optim.AdamW(p, 0.05, fused=True),
    ],
    ids=["sgd", "foreach adam", "fused adamw"],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_pruned_weights_never_move_and_values_stay_on_the_grid(make, quantized):
    layer, latent = layer_and_latent(quantized)
    gone = ~latent.mask()["weight"]
    optimizer = make(layer.parameters())
    before = layer.weight.detach().clone()
    latent.attach([optimizer])

    for seed in range(6):
        step(layer, latent, optimizer, seed)
        assert (layer.weight[gone] == 0).all()
        if quantized:
            codes = layer.weight / latent.scales["weight"].unsqueeze(1)
            torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
            assert (codes.abs() <= (2.0 ** (BITS.float() - 1) - 1).unsqueeze(1) + 1e-5).all()
    assert not torch.equal(layer.weight, before)


def test_training_equals_the_straight_through_estimator():
    """A twin that keeps the latent as its parameter and quantizes in the forward pass ends at the same weights."""
    layer, latent = layer_and_latent()
    keep, scales = latent.mask()["weight"], latent.scales["weight"].clone()
    first = scales
    shadow = nn.Parameter(latent.state_dict()["latents"]["weight"].clone())
    bias = nn.Parameter(layer.bias.detach().clone())
    ours = torch.optim.SGD(layer.parameters(), 0.02, momentum=0.9)
    theirs = torch.optim.SGD([shadow, bias], 0.02, momentum=0.9)
    latent.attach([ours])

    for seed in range(10):
        step(layer, latent, ours, seed)

        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        theirs.zero_grad()
        value = shadow + (quantize(shadow.detach(), BITS, scales) - shadow).detach()
        nn.functional.linear(x, value, bias).square().sum().backward()
        shadow.grad *= keep
        theirs.step()
        shadow.data *= keep
        if seed == 7:  # every eighth step
            scales = refit_scales(shadow.detach(), BITS, scales)
            assert not torch.equal(scales, first)

    torch.testing.assert_close(layer.weight.detach(), quantize(shadow.detach(), BITS, scales), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(latent.state_dict()["latents"]["weight"], shadow.detach(), rtol=1e-5, atol=1e-6)


def test_a_step_that_never_comes_leaves_compressed_weights():
    layer, latent = layer_and_latent()
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    latent.attach([optimizer])
    compressed = layer.weight.detach().clone()
    layer(torch.ones(1, 6)).sum().backward()

    latent.before_step(optimizer)
    assert not torch.equal(layer.weight, compressed)
    latent.settle()

    assert torch.equal(layer.weight, compressed)


def test_infinite_gradients_of_pruned_weights_become_zero_not_nan():
    layer, latent = layer_and_latent()
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    layer.weight.grad = torch.full_like(layer.weight, torch.inf)

    latent.before_step(optimizer)

    assert (layer.weight.grad[~latent.mask()["weight"]] == 0).all()


def test_a_step_behind_the_callbacks_back_is_refused():
    layer, latent = layer_and_latent()
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    latent.attach([optimizer])
    layer(torch.ones(1, 6)).sum().backward()

    with pytest.raises(LatentCopyError, match=r"SGD stepped on weight without .* self.optimizers\(\).step\(\)"):
        optimizer.step()


def test_lbfgs_is_refused():
    layer, latent = layer_and_latent()
    with pytest.raises(LatentCopyError, match="LBFGS evaluates the loss several times within a step"):
        latent.attach([torch.optim.LBFGS(layer.parameters())])


def test_detaching_removes_every_hook():
    layer, latent = layer_and_latent()
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    latent.attach([optimizer])

    latent.detach()
    latent.detach()

    assert not optimizer._optimizer_step_post_hooks


def test_state_of_another_model_is_refused():
    _, latent = layer_and_latent()
    state = latent.state_dict()

    with pytest.raises(LatentCopyError, match="compressed weight, which is not among this fit's layers"):
        LatentCopy({"other": nn.Parameter(torch.ones(3, 6))}).load_state_dict(state)
    with pytest.raises(LatentCopyError, match=r"holds weight of shape \(3, 6\), the model \(6, 6\)"):
        LatentCopy({"weight": nn.Parameter(torch.ones(6, 6))}).load_state_dict(state)
