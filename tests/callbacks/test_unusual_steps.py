"""Optimizers that cannot be, that come later or hold others, and weights that are frozen, tied or parametrized."""

from contextlib import nullcontext

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
)

from lightning_xai_compress import LatentCopyError

from stepping import Manual, Watch, compress, stepping_with
from toy import TiedNet, ToyNet, compression, fit

# --- optimizers that cannot be


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021): evaluates, climbs, evaluates again, steps from the start."""

    def __init__(self, parameters):
        super().__init__(parameters, {"rho": 0.05})
        self.base = torch.optim.SGD(self.param_groups, 0.05)

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        parameters = [each for group in self.param_groups for each in group["params"]]
        climbs = [0.05 * each.grad for each in parameters]
        torch._foreach_add_(parameters, climbs)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(parameters, climbs)
        self.base.step()
        return loss


@pytest.mark.parametrize("make", [lambda net: torch.optim.LBFGS(net.parameters()), lambda net: Sharp(net.parameters())])
def test_optimizers_that_evaluate_the_loss_several_times_a_step_are_refused_with_the_reason(tmp_path, make):
    model = stepping_with(make)()
    with pytest.raises(
        LatentCopyError, match=r"(LBFGS|Sharp) evaluates the loss several times within a step, so pruned"
    ):
        fit(tmp_path, [compression(tmp_path)], model)
    assert len(model.losses) <= 2


def test_sharpness_aware_steps_by_hand_are_refused_with_the_reason(tmp_path):
    class ByHand(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.loss(batch))
            optimizer.optimizer.base.step()

        def configure_optimizers(self):
            return Sharp(self.parameters())

    with pytest.raises(LatentCopyError, match=r"SGD stepped on first\.weight without Lightning's"):
        fit(tmp_path, [compression(tmp_path)], ByHand)


def test_an_optimizer_that_lightning_does_not_know_is_refused_with_the_reason(tmp_path):
    class Private(ToyNet):
        def on_train_start(self):
            self.private = torch.optim.SGD(self.head.parameters(), 0.01)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.current_epoch == 1:
                self.private.step()

    with pytest.raises(LatentCopyError, match="nor an optimizer that configure_optimizers does not return"):
        fit(tmp_path, [compression(tmp_path)], Private)


def test_another_models_optimizer_and_later_ones_are_left_alone(tmp_path):
    """Steps are watched in the whole process; those on other parameters are not ours, and nothing stays behind."""
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), 1.0)

    class Beside(L.Callback):
        def on_train_batch_end(self, *arguments):
            before = other.weight.detach().clone()
            optimizer.zero_grad()
            other(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            assert torch.equal(other.weight, before - 1)

    trained, _, _ = compress(tmp_path, callbacks=[Beside()])

    head = torch.optim.SGD(trained.head.parameters(), 1.0)
    trained.head(torch.ones(1, 32)).sum().backward()
    before = trained.head.weight.detach().clone()
    head.step()
    assert not torch.equal(trained.head.weight, before)


class Foreign:
    """What Lightning takes for an optimizer: it has the methods."""

    def __init__(self, parameters):
        self.param_groups, self.defaults, self.state = [{"params": [*parameters], "lr": 0.1}], {}, {}

    def step(self, closure=None):
        return closure()

    def zero_grad(self, set_to_none=True):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_an_optimizer_of_another_library_is_refused_with_the_reason(tmp_path):
    with pytest.raises(LatentCopyError, match=r"Foreign is no torch\.optim\.Optimizer, so its steps cannot be watched"):
        fit(tmp_path, [compression(tmp_path)], stepping_with(lambda net: Foreign(net.parameters())))


@pytest.mark.parametrize("fails", [False, True])
def test_no_step_is_watched_after_the_fit(tmp_path, fails):
    before = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)

    class Failing(ToyNet):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert len(_global_optimizer_pre_hooks) == before[0] + 1
            if fails:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut") if fails else nullcontext():
        fit(tmp_path, [compression(tmp_path)], Failing)
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == before


# --- optimizers that come later, or hold others


class Slow(torch.optim.Optimizer):
    """Lookahead (Zhang et al. 2019): writes to the weights after its inner optimizer has stepped."""

    def __init__(self, parameters):
        self.inner = torch.optim.SGD(parameters, 0.05, momentum=0.9)
        super().__init__(self.inner.param_groups, {})
        self.slow = [each.detach().clone() for group in self.param_groups for each in group["params"]]

    def step(self, closure=None):
        loss = self.inner.step(closure)
        with torch.no_grad():
            for slow, fast in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow.lerp_(fast, 0.5)
                fast.copy_(slow)
        return loss


def test_an_optimizer_that_holds_another_is_closed_after_the_outer_step(tmp_path):
    """The inner step is in the midst of the outer one, so only batches are looked at."""
    callback = compression(tmp_path)
    watch = Watch(callback)
    watch.on_train_start = lambda *arguments: setattr(watch, "handle", register_optimizer_step_post_hook(print))
    trained, run = fit(tmp_path, [callback, watch], stepping_with(lambda net: Slow([*net.parameters()])))
    plain, _ = fit(tmp_path / "plain", [], stepping_with(lambda net: Slow([*net.parameters()])))

    assert watch.quantized
    assert callback.report.sparsity == 0.5
    assert trained.losses[:8] == plain.losses[:8]
    latents = callback.session.latent.state_dict()["latents"]["second.weight"]
    slow = run.optimizers[0].slow[
        next(i for i, (n, _) in enumerate(trained.named_parameters()) if n == "second.weight")
    ]
    torch.testing.assert_close(latents, slow * callback.session.latent.keep["second.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("epoch", [1, 3, 6], ids=["before pruning", "while pruning", "quantized"])
def test_an_optimizer_that_a_callback_puts_in_later_steps_on(tmp_path, epoch):
    class Replace(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == epoch:
                trainer.strategy.optimizers = [torch.optim.AdamW(pl_module.parameters(), 0.01, weight_decay=0.1)]
                self.before = pl_module.head.weight.detach().clone()

    replace = Replace()
    trained, _, _ = compress(tmp_path, callbacks=[replace])
    assert not torch.equal(trained.head.weight, replace.before)  # its steps are not lost


class Freeze(BaseFinetuning):
    """Freezes a layer, and adds it to the optimizer later."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.second, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.second, optimizer, train_bn=False)


class HeadOnly(ToyNet):
    def configure_optimizers(self):
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], 0.05, momentum=0.9)


@pytest.mark.parametrize("epoch", [3, 6, 99], ids=["while pruning", "quantized", "never"])
def test_a_frozen_layer_is_compressed_and_may_be_unfrozen_later(tmp_path, epoch):
    trained, callback, _ = compress(tmp_path, HeadOnly, [Freeze(epoch)])

    layer = next(each for each in callback.report.layers if each.name == "second.weight")
    assert layer.sparsity > 0
    assert layer.bits
    assert trained.second.weight.requires_grad == (epoch != 99)
    torch.manual_seed(0)
    start = HeadOnly().second.weight
    latent = callback.session.latent.state_dict()["latents"]["second.weight"]
    keep = callback.session.latent.keep["second.weight"]
    assert torch.equal(latent[keep], start[keep]) == (epoch == 99)  # frozen: what it was, but for zeros


# --- weights that are not plain parameters


def test_tied_weights_stay_tied_and_are_compressed_once(tmp_path):
    trained, callback, _ = compress(tmp_path, TiedNet)
    assert trained.third.weight is trained.second.weight
    assert [layer.name for layer in callback.report.layers] == ["first.weight", "head.weight", "second.weight"]


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    ],
    ids=["parametrized weight_norm", "spectral_norm", "old weight_norm", "torch pruning"],
)
def test_weights_under_another_name_are_named_as_skipped(tmp_path, change):
    class Changed(ToyNet):
        def __init__(self):
            super().__init__()
            change(self.second)

    _, callback, _ = compress(tmp_path, Changed)
    assert [layer.name for layer in callback.report.layers] == ["first.weight", "head.weight"]
    reasons = {each.name: each.reason for each in callback.report.skipped}
    assert "parametrized or masked by torch.nn.utils: make that permanent first" in reasons["second"]
    assert all(name.startswith("second") for name in reasons)
