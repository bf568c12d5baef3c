"""Whatever steps: after every single step no pruned weight has moved, and the others are on their grids."""

import lightning as L
import pytest
import torch

from stepping import Manual, Watch, compress, stepping_with
from toy import ToyNet, compression, fit


def test_accumulated_batches(tmp_path):
    compress(tmp_path, accumulate_grad_batches=3)


def test_clipping_by_norm(tmp_path):
    compress(tmp_path, gradient_clip_val=0.1)


def test_clipping_by_value(tmp_path):
    compress(tmp_path, gradient_clip_val=0.01, gradient_clip_algorithm="value")


def test_accumulated_batches_with_clipping(tmp_path):
    compress(tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.1)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(tmp_path, precision):
    """In bf16-true a value is code * scale rounded to bfloat16, and the file gives that very value."""
    compress(tmp_path, precision=precision)


def test_overfit_batches(tmp_path):
    compress(tmp_path, overfit_batches=2)


OPTIMIZERS = {
    "momentum and decay": lambda net: torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda net: torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, nesterov=True, foreach=True),
    "fused SGD": lambda net: torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, fused=True, weight_decay=0.1),
    "foreach AdamW": lambda net: torch.optim.AdamW(net.parameters(), 0.01, foreach=True, weight_decay=0.1),
    "fused AdamW": lambda net: torch.optim.AdamW(net.parameters(), 0.01, fused=True, weight_decay=0.1),
    "amsgrad": lambda net: torch.optim.Adam(net.parameters(), 0.01, amsgrad=True, foreach=False),
    "RMSprop": lambda net: torch.optim.RMSprop(net.parameters(), 0.003, momentum=0.9, centered=True),
    "NAdam": lambda net: torch.optim.NAdam(net.parameters(), 0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "Adafactor": lambda net: torch.optim.Adafactor(net.parameters(), 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_and_decay_of_pruned_weights(tmp_path, name):
    compress(tmp_path, stepping_with(OPTIMIZERS[name]))


def test_several_parameter_groups(tmp_path):
    def make(net):
        decayed = [each for each in net.parameters() if each.dim() > 1]
        plain = [each for each in net.parameters() if each.dim() <= 1]
        groups = [{"params": decayed[:1]}, {"params": decayed[1:], "lr": 0.02, "weight_decay": 0.1}, {"params": plain}]
        return torch.optim.SGD(groups, 0.05, momentum=0.9)

    compress(tmp_path, stepping_with(make))


@pytest.mark.parametrize("name", ["one cycle", "plateau", "warm-up"])
def test_schedulers(tmp_path, name):
    def make(net):
        optimizer = torch.optim.AdamW(net.parameters(), 0.01)
        if name == "one cycle":  # moves betas, too
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=32)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        if name == "plateau":
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_acc"}}
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 8))  # from 0 on
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    rates = set()

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            rates.add(trainer.optimizers[0].param_groups[0]["lr"])

    compress(tmp_path, stepping_with(make), [Rates()])
    assert len(rates) > 1


class Rivals(Manual):
    """One optimizer steps at every batch, the other at every second one, each toggled as in a GAN."""

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        for optimizer, every in ((body, 1), (head, 2)):
            if batch_idx % every == 0:
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        head = torch.optim.AdamW(self.head.parameters(), 0.01, betas=(0.5, 0.9), weight_decay=0.1)
        return [torch.optim.SGD(self.body(), 0.05, momentum=0.9), head]


def test_two_optimizers_of_different_frequency(tmp_path):
    head = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            head.append(pl_module.head.weight.detach().clone())

    trained, _, _ = compress(tmp_path, Rivals, [Look()])

    assert all(torch.equal(head[i], head[i - 1]) for i in (21, 23, 25, 31))  # it is the other one's turn
    assert any(not torch.equal(head[i], head[i - 1]) for i in (22, 24, 26, 30))
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_two_optimizers_with_closures(tmp_path):
    class Closures(Rivals):
        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():

                def closure(optimizer=optimizer):
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))

                optimizer.step(closure=closure)

    compress(tmp_path, Closures)


def test_two_optimizers_that_share_parameters_and_step_twice_a_batch(tmp_path):
    class Shared(Manual):
        def training_step(self, batch, batch_idx):
            for optimizer in (*self.optimizers(), self.optimizers()[0]):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.02), torch.optim.AdamW(self.head.parameters(), 0.01)]

    compress(tmp_path, Shared)


def test_accumulation_and_clipping_by_hand(tmp_path):
    """Lightning clips before it knows of the step, and the norm must not count pruned weights there either."""
    seen = []

    class ByHand(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.loss(batch) / 2)
            if batch_idx % 2:
                keep = callback.session.latent.keep
                parameters = dict(self.named_parameters())
                seen.append({name: parameters[name].grad[~keep[name]] for name in keep})
                self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()

    callback = compression(tmp_path)
    watch = Watch(callback)
    fit(tmp_path, [callback, watch], ByHand)
    assert [bool(each) for each in seen] == [False] * 4 + [True] * 12
    assert sum(gradient.numel() for gradient in seen[-1].values()) == 388
    assert not any(gradient.any() for each in seen for gradient in each.values())
    assert callback.report.sparsity == 0.5
    assert watch.quantized


def test_the_clip_norm_is_that_of_the_weights_that_are_left(tmp_path):
    """Against a norm worked out from the raw gradients."""
    callback = compression(tmp_path, warmup=0.0, pruning_end=0.1, sparsity=0.9)
    checked = []

    class Norms(ToyNet):
        def on_after_backward(self):
            self.raw = {name: parameter.grad.clone() for name, parameter in self.named_parameters()}

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            keep = callback.session.latent.keep
            left = {name: grad * keep[name] if name in keep else grad for name, grad in self.raw.items()}
            norm = torch.stack([grad.square().sum() for grad in left.values()]).sum().sqrt()
            everything = torch.stack([grad.square().sum() for grad in self.raw.values()]).sum().sqrt()
            for name, parameter in self.named_parameters():
                torch.testing.assert_close(
                    parameter.grad, left[name] * min(1.0, 1e-4 / float(norm + 1e-6)), rtol=1e-4, atol=0
                )
            checked.append(float(everything / norm))

    fit(tmp_path, [callback], Norms, gradient_clip_val=1e-4)
    assert len(checked) == 32
    assert max(checked) > 1.5  # what the other norm would have been
