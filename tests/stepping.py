"""Fits that are watched at every single step of any optimizer."""

import lightning as L
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_xai_compress import load_compressed

from toy import ToyNet, compression, fit


class Watch(L.Callback):
    """Looks at the weights after each step of any optimizer, and after each batch."""

    def __init__(self, compression):
        self.compression, self.pruned, self.quantized, self.gone = compression, 0, 0, {}

    def on_train_start(self, trainer, pl_module):
        self.handle = register_optimizer_step_post_hook(lambda *step: self.look())

    def on_train_batch_end(self, *arguments):
        self.look()

    def on_train_end(self, trainer, pl_module):
        self.handle.remove()

    def on_exception(self, *arguments):
        self.handle.remove()

    @torch.no_grad()
    def look(self):
        latent = self.compression.session.latent
        for name, parameter in latent.parameters.items():
            if name in latent.keep:
                gone = ~latent.keep[name]
                assert (parameter[gone] == 0).all(), name
                assert not (self.gone.get(name, gone) & ~gone).any()  # what is gone stays gone
                self.gone[name] = gone
                self.pruned += int(gone.sum())
            if name in latent.bits:
                scale = latent.scales[name].unsqueeze(1)
                codes = (parameter.float().flatten(1) / scale.clamp(min=1e-30)).round()
                assert torch.equal((codes * scale).to(parameter.dtype), parameter.flatten(1)), name
                assert (codes.abs() <= (2.0 ** (latent.bits[name].float() - 1) - 1).unsqueeze(1)).all()
                self.quantized += 1


def compress(folder, model=ToyNet, callbacks=(), **settings):
    """A watched fit, whose file holds the very weights; returns the module, the callback and the watch."""
    callback = compression(folder)
    watch = Watch(callback)
    trained, _ = fit(folder, [callback, *callbacks, watch], model, **settings)
    assert callback.report.sparsity == 0.5
    assert 2.8 < callback.report.average_bits <= 3.0
    assert watch.pruned
    assert watch.quantized
    torch.manual_seed(0)
    empty = model().to(next(trained.parameters()).dtype)
    reloaded = load_compressed(folder / "model.safetensors", empty).state_dict()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(reloaded[name], tensor), name
    return trained, callback, watch


def stepping_with(make):
    class Net(ToyNet):
        def configure_optimizers(self):
            return make(self)

    return Net


class Manual(ToyNet):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def body(self):
        return [*self.first.parameters(), *self.norm.parameters(), *self.second.parameters()]

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])
