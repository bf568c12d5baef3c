"""The latent copy: its two states, and the ways in which an optimizer step may go wrong."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch import nn
from torch.optim import optimizer as optimizers
from torch.utils.data import DataLoader

from lightning_xai_compress import BitAllocation, LatentCopyError, Mask
from lightning_xai_compress.callbacks.latent import LatentCopy
from lightning_xai_compress.quantization import fit_scales, quantize, refit_scales

from toy import Corners, compression, fit

BITS = torch.tensor([2, 3, 4], dtype=torch.uint8)


def watching():
    """Hooks that every optimizer of this process calls."""
    return {*optimizers._global_optimizer_pre_hooks, *optimizers._global_optimizer_post_hooks}


@pytest.fixture(autouse=True)
def _leaves_no_hooks(monkeypatch):
    """What a test attaches is detached after it: the hooks would see the steps of all tests that follow."""
    attached, attach, before = [], LatentCopy.attach, watching()

    def noted(latent, *arguments, **settings):
        attached.append(latent)
        attach(latent, *arguments, **settings)

    monkeypatch.setattr(LatentCopy, "attach", noted)
    yield
    for latent in attached:
        latent.detach()
    assert watching() == before


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
    before = watching()
    latent.attach([optimizer])
    assert len(watching()) == len(before) + 2

    latent.detach()
    latent.detach()

    assert watching() == before


def test_state_of_another_model_is_refused():
    _, latent = layer_and_latent()
    state = latent.state_dict()

    with pytest.raises(LatentCopyError, match="compressed weight, which is not among this fit's layers"):
        LatentCopy({"other": nn.Parameter(torch.ones(3, 6))}).load_state_dict(state)
    with pytest.raises(LatentCopyError, match=r"holds weight of shape \(3, 6\), the model \(6, 6\)"):
        LatentCopy({"weight": nn.Parameter(torch.ones(6, 6))}).load_state_dict(state)


@pytest.mark.parametrize("quantized", [False, True])
def test_steps_after_a_change_of_the_order_in_memory_equal_those_without(quantized):
    ended = []
    for turn in (False, True):
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 3, 3)
        latent = LatentCopy({"weight": layer.weight})
        latent.apply_mask(Mask({"weight": torch.rand(3, 4, 3, 3) > 0.4}))
        if quantized:
            scales = fit_scales(layer.weight.detach(), 3)[0]
            latent.apply_bits(BitAllocation({"weight": BITS}, {"weight": 36}), {"weight": scales})
        gone = ~latent.mask()["weight"]
        optimizer = torch.optim.SGD(layer.parameters(), 0.02)
        latent.attach([optimizer])
        if turn:
            layer.to(memory_format=torch.channels_last)
            assert latent.holds()
        for seed in range(3):
            x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            latent.before_step(optimizer)
            optimizer.step()
        latent.detach()
        assert (layer.weight[gone] == 0).all()
        ended.append(layer.weight.detach().clone())
    torch.testing.assert_close(*ended, rtol=1e-5, atol=1e-6)


def test_steps_while_a_trial_is_on_are_let_through():
    layer, latent = layer_and_latent()
    optimizer, on = torch.optim.SGD(layer.parameters(), 0.05), [False]
    twin = nn.Parameter(layer.weight.detach().clone())
    latent.attach([optimizer], active=lambda: on[0])
    layer(torch.ones(1, 6)).sum().backward()

    optimizer.step()

    assert torch.equal(layer.weight, twin - 0.05 * layer.weight.grad)
    on[0] = True
    with pytest.raises(LatentCopyError, match="SGD stepped on weight without"):
        optimizer.step()


class InOrder(Corners):
    """A search makes the loaders anew, and with them samplers that do not know the epoch."""

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=16)


class FineTunes(LearningRateFinder):
    """As in Lightning's documentation."""

    def __init__(self, milestones):
        super().__init__(num_training_steps=3, early_stop_threshold=None, update_attr=False)
        self.milestones, self.kept, self.steps = milestones, {}, []

    def on_fit_start(self, *args, **kwargs):
        return

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in self.milestones:
            before = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
            self.lr_find(trainer, pl_module)
            self.steps.append(len(self.optimal_lr.results["lr"]))
            after = pl_module.state_dict()
            self.kept[trainer.current_epoch] = all(torch.equal(after[name], each) for name, each in before.items())


def try_steps(trainer, params):
    """Lightning 2.6 takes a loop past its first epoch for one that resumes at its end, and tries no step."""
    loop = trainer.fit_loop
    loop.load_state_dict(copy.deepcopy(params["loop_state_dict"]))
    loop.restarting = loop.epoch_loop.restarting = False
    loop.epoch_loop.batch_progress.reset_on_run()
    loop.run()


def test_a_search_for_a_learning_rate_within_the_fit_changes_nothing_of_the_compression(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.tuner.lr_finder._try_loop_run", try_steps)

    def run(folder, milestones):
        callback, finder = compression(folder), FineTunes(milestones)
        model, trainer = fit(folder, [callback, finder], data=InOrder())
        assert finder.kept == dict.fromkeys(milestones, True)
        assert finder.steps == [3 for _ in milestones]
        assert trainer.global_step == 32
        assert callback._restored == {}
        return callback, model

    searched, model = run(tmp_path / "searched", (0, 3, 6))  # before pruning, while pruning, quantized
    undisturbed, plain = run(tmp_path / "plain", ())

    history = searched.report.history
    assert history == undisturbed.report.history
    assert next(each["epoch"] for each in history if each["event"] == "quantized") < 6
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("asked", [False, True], ids=["", "asked before"])
def test_after_detaching_every_tensor_lies_where_its_parameter_does(asked):
    """The device that holds no data stands for the one to which Lightning moves a module after a fit."""
    layer, latent = layer_and_latent()
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    latent.attach([optimizer])
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.empty_like(layer.weight, device="meta")))
    if asked:
        values, scales = latent.projected("weight", torch.ones(3, 6))
        assert values.device == scales.device == layer.weight.device

    latent.detach()

    assert latent.keep._packed["weight"].device == layer.weight.device
    state = latent.state_dict()
    for part in ("keep", "bits", "scales", "latents"):
        assert state[part]["weight"].device == layer.weight.device, part
