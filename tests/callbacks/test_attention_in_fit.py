"""Attention is compressed where it computes: in training, and on PyTorch's fast path, which passes modules by."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xai_compress import load_compressed

from toy import Corners, compression, fit

WIDTH = 16


class Reader(L.LightningModule):
    """Reads the six rows of an image as a sequence; some samples are shorter, and say so by a mask.

    Args:
        kind: "encoder", "norm first", "sequence first", or "attention": an nn.MultiheadAttention alone, or "other
            widths": one whose queries, keys and values have weights of their own.
        dropout: In training.
    """

    def __init__(self, kind, dropout=0.1):
        super().__init__()
        self.kind = kind
        self.embed = nn.Linear(6, WIDTH)
        if kind in ("attention", "other widths"):
            widths = {"kdim": 6, "vdim": 6} if kind == "other widths" else {}
            self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=dropout, batch_first=True, **widths)
        else:
            layer = nn.TransformerEncoderLayer(
                *(WIDTH, 2, 24, dropout), batch_first=kind != "sequence first", norm_first=kind == "norm first"
            )
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=kind == "encoder")
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        rows = x.squeeze(1)
        padding = rows.new_zeros(rows.shape[:2], dtype=torch.bool)
        padding[::3, 5] = True  # of every third sample the last row is no part
        x = self.embed(rows)
        if self.kind == "sequence first":
            x = self.encoder(x.transpose(0, 1), src_key_padding_mask=padding).transpose(0, 1)
        elif self.kind == "attention":
            x = x + self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        elif self.kind == "other widths":
            x = x + self.attention(x, rows, rows, key_padding_mask=padding, need_weights=False)[0]
        else:
            x = self.encoder(x, src_key_padding_mask=padding)
        return self.head(x.masked_fill(padding.unsqueeze(2), 0.0).mean(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)


class Spy:
    """Keeps copies of the weights that reach PyTorch's fast kernels."""

    def __init__(self, monkeypatch):
        self.shapes = []
        self.on_grid = []
        for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
            monkeypatch.setattr(torch, name, self.around(getattr(torch, name)))
        self.expected = lambda: ()

    def around(self, kernel):
        def spied(*arguments):
            weights = [each for each in arguments if isinstance(each, nn.Parameter) and each.dim() == 2]
            self.shapes.append([tuple(each.shape) for each in weights])
            known = self.expected()
            self.on_grid += [any(each is k for k in known) and on_grid(each, *known[each]) for each in weights]
            return kernel(*arguments)

        return spied


@torch.no_grad()
def on_grid(weight, keep, bits, scale):
    codes = (weight / scale.clamp(min=1e-30).unsqueeze(1)).round()
    fits = bool((codes.abs() <= (2.0 ** (bits.float() - 1) - 1).unsqueeze(1)).all())
    return fits and torch.equal(codes * scale.unsqueeze(1), weight) and not bool(weight[~keep].any())


class Watch(L.Callback):
    """After each batch: every weight is masked and on its grid."""

    def __init__(self, compression):
        self.compression, self.checked = compression, 0

    def grids(self):
        latent = self.compression.session.latent
        return {
            parameter: (latent.keep[name], latent.bits[name], latent.scales[name])
            for name, parameter in latent.parameters.items()
            if name in latent.bits
        }

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        latent = self.compression.session.latent
        for name, keep in latent.keep.items():
            assert not latent.parameters[name][~keep].any(), name
        grids = self.grids()
        assert all(on_grid(weight, *grid) for weight, grid in grids.items())
        self.checked += bool(grids)


@pytest.mark.parametrize("kind", ["encoder", "norm first", "sequence first", "attention", "other widths"])
def test_attention_is_masked_and_quantized_in_training_and_on_the_fast_path(tmp_path, monkeypatch, kind):
    def make(dropout=0.1):
        return Reader(kind, dropout)

    spy = Spy(monkeypatch)
    callback = compression(tmp_path)
    watch = Watch(callback)
    epoch = []

    class Validation(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            if not trainer.sanity_checking and callback.session.latent.quantized:
                spy.expected = watch.grids
                spy.on_grid.clear()

        def on_validation_end(self, trainer, pl_module):
            epoch.append((len(spy.on_grid), all(spy.on_grid)))

    torch.manual_seed(0)
    trained, _ = fit(tmp_path, [callback, watch, Validation()], make())
    images = Corners().data.tensors[0]

    names = {layer.name for layer in callback.report.layers}
    inputs = {"in_proj_weight"} if kind != "other widths" else {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    assert inputs <= {name.rpartition(".")[2] for name in names}
    assert all(layer.bits for layer in callback.report.layers)
    assert watch.checked == 13  # from batch 19 of 32 on
    if kind in ("encoder", "norm first"):  # four weights in each of two layers, two batches of 32
        assert epoch[-1] == (16, True)
    elif kind == "attention":
        assert epoch[-1] == (4, True)
    else:
        assert not spy.shapes  # PyTorch has no fast path for these

    twin = load_compressed(tmp_path / "model.safetensors", make(dropout=0.0))
    with torch.no_grad():
        fast = trained.eval()(images)
        assert torch.equal(fast, twin.eval()(images))
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = trained(images)
            assert torch.equal(slow, twin(images))
        finally:
            torch.backends.mha.set_fastpath_enabled(before)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    for module in trained.modules():
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            module.p = module.dropout = 0.0
    # gradients are on, dropout is off: the way of training
    torch.testing.assert_close(trained.train()(images), twin.train()(images), rtol=0, atol=0)
    torch.testing.assert_close(trained(images).detach(), slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "norm first"])
def test_the_fast_path_is_as_good_as_a_run_without_it(tmp_path, kind):
    """Fits with and without it validate alike, and train to the same bits."""

    def run(folder, enabled):
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            torch.manual_seed(0)
            module, fitted = fit(folder, [compression(folder)], Reader(kind, dropout=0.0))
        finally:
            torch.backends.mha.set_fastpath_enabled(before)
        return module.state_dict(), float(fitted.callback_metrics["val_acc"])

    with_it, accuracy = run(tmp_path / "with", True)
    without, other = run(tmp_path / "without", False)

    assert accuracy == other
    for name, tensor in without.items():
        assert torch.equal(with_it[name], tensor), name
