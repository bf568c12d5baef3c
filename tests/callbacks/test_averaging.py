"""Averages of weights are masked and on the grid wherever they are seen, and stay plain averages otherwise."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lightning_xai_compress import CompressedExport, Files, load_compressed
from lightning_xai_compress.callbacks.checkpoint import plan_of

from toy import Corners, TiedNet, ToyNet, compression, fit, trainer


class PlainNet(ToyNet):
    """Without BatchNorm: StochasticWeightAveraging then needs no epoch for its statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()


AVERAGING = {
    "ema": (ToyNet, lambda: EMAWeightAveraging(decay=0.8)),
    "ema without buffers": (ToyNet, lambda: EMAWeightAveraging(decay=0.8, use_buffers=False)),
    "ema at epochs": (
        ToyNet,
        lambda: EMAWeightAveraging(decay=0.8, update_every_n_steps=0, update_starting_at_epoch=0),
    ),
    "mean": (ToyNet, WeightAveraging),
    "swa with batchnorm": (ToyNet, lambda: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=0.7)),
    "swa": (PlainNet, lambda: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=0.7)),
}


def holds(model, plan):
    """Zeros where pruned, and no more values in a channel than its width allows."""
    parameters = dict(model.named_parameters())
    for name, keep in plan.mask.keep.items():
        assert not parameters[name][~keep].any(), name
    for name, bits in plan.allocation.bits.items() if plan.allocation else ():
        for row, width in zip(parameters[name].detach().flatten(1), bits.tolist(), strict=True):
            assert len(row.unique()) <= 2**width - 1, name


class Watch(Callback):
    """Looks at the weights that validation computes with."""

    def __init__(self, compressing):
        self.compressing, self.looks = compressing, 0

    def on_validation_batch_end(self, trainer, pl_module, *args, **kwargs):
        if not trainer.sanity_checking:
            holds(pl_module, self.compressing.session.latent.plan())
            self.looks += 1


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("kind", AVERAGING)
def test_averaged_weights_keep_zeros_and_grid_in_validation_and_at_the_end(tmp_path, kind, first):
    make_model, make = AVERAGING[kind]
    callback, averaging = compression(tmp_path, metric="val_acc"), make()
    watch = Watch(callback)
    callbacks = [callback, averaging, watch] if first == "ours" else [averaging, callback, watch]

    model, _ = fit(tmp_path, callbacks, make_model)

    holds(model, callback.session.latent.plan())
    assert callback.report.sparsity == pytest.approx(0.5, abs=0.01)
    assert watch.looks == 2 * (9 if kind == "swa with batchnorm" else 8)
    reloaded = load_compressed(tmp_path / "model.safetensors", make_model())
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", AVERAGING)
def test_the_final_weights_are_the_average_of_those_that_trained(tmp_path, kind):
    """A twin of the callback averages by itself, from what each step left."""
    make_model, make = AVERAGING[kind]
    averaging, callback = make(), compression(tmp_path)
    seen = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(pl_module.head.weight.detach().clone())

    torch.manual_seed(0)
    first = make_model().head.weight.detach().clone()
    model, _ = fit(tmp_path, [callback, averaging, Record()], make_model)

    # 4 batches an epoch, 8 epochs
    if kind.startswith("swa"):
        taken = [seen[4 * epoch - 1] for epoch in range(4, 8)]  # at the start of epochs 4 to 7
        expected = torch.stack(taken).mean(0)
    elif kind == "mean":
        expected = torch.stack(seen).mean(0)
    else:
        expected = first if kind == "ema at epochs" else None
        for value in seen[3::4] if kind == "ema at epochs" else seen:
            expected = value if expected is None or expected is first else 0.8 * expected + 0.2 * value
    latent = callback.session.latent
    keep = latent.mask()["head.weight"]
    torch.testing.assert_close(latent.state_dict()["latents"]["head.weight"], expected * keep, rtol=1e-4, atol=1e-6)
    assert not torch.equal(model.head.weight, seen[31])


@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_validation_leaves_the_average_alone(tmp_path, kind):
    make_model, make = AVERAGING[kind]
    ends = []
    for limit in (1.0, 0):
        model, _ = fit(tmp_path, [compression(tmp_path), make()], make_model, limit_val_batches=limit)
        ends.append([parameter.detach().clone() for parameter in model.parameters()])

    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


@pytest.mark.parametrize("kind", ["ema", "ema without buffers", "mean"])
def test_a_checkpoint_of_an_average_holds_quantized_weights_and_resumes_bit_for_bit(tmp_path, kind):
    _, make = AVERAGING[kind]
    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    whole, _ = fit(tmp_path / "whole", [compression(tmp_path / "whole"), make(), saver], enable_checkpointing=True)

    for epoch in (3, 6):
        path = tmp_path / "ckpt" / f"epoch={epoch}.ckpt"
        plain = ToyNet.load_from_checkpoint(path, strict=True)
        plan = plan_of(torch.load(path, weights_only=True))
        holds(plain, plan)
        if plan.allocation:
            for name, scale in plan.scales.items():  # the scales are those of the weights beside them
                codes = dict(plain.named_parameters())[name].detach().flatten(1) / scale.clamp(min=1e-30)[:, None]
                torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)

        resumed, _ = fit(tmp_path / "again", [make(), compression(tmp_path / "again")], ckpt_path=str(path))
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_checkpoint_of_an_average_is_resumed_without_averaging(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    average = EMAWeightAveraging(decay=0.8)
    fit(tmp_path, [compression(tmp_path), average, saver], enable_checkpointing=True)

    callback = compression(tmp_path)
    model, _ = fit(tmp_path, [callback], ckpt_path=str(tmp_path / "ckpt" / "epoch=5.ckpt"))

    holds(model, callback.session.latent.plan())
    assert callback.report.artifacts[0].max_abs_diff == 0


def test_the_best_average_is_what_was_validated(tmp_path):
    callback = compression(tmp_path, metric="val_acc", export="best", mode="max")
    shown = {}

    class Record(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args, **kwargs):
            shown[trainer.current_epoch] = {name: each.clone() for name, each in pl_module.state_dict().items()}

    fit(tmp_path, [EMAWeightAveraging(decay=0.8), callback, Record()])

    reloaded = load_compressed(tmp_path / "model.safetensors", ToyNet())
    epoch = int(callback.report.exported_epoch) - 1
    for name, tensor in shown[epoch].items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name


def test_two_swapping_averages_are_refused(tmp_path):
    with pytest.raises(ValueError, match="EMAWeightAveraging and WeightAveraging would average each other's weights"):
        fit(tmp_path, [compression(tmp_path), EMAWeightAveraging(), WeightAveraging()])


def test_weights_written_by_a_callback_after_the_export_are_compressed_again(tmp_path):
    class Late(Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.head.weight.add_(0.01)

    callback = compression(tmp_path)
    with pytest.warns(UserWarning, match="Another callback changed weights after the export"):
        model, _ = fit(tmp_path, [callback, Late()])

    reloaded = load_compressed(tmp_path / "model.safetensors", ToyNet())
    assert all(torch.equal(reloaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("how", ["after the fit", "after an error"])
def test_a_checkpoint_saved_later_holds_quantized_weights(tmp_path, how):
    class Failing(ToyNet):
        def training_step(self, batch, batch_idx):
            if how == "after an error" and self.global_step == 27:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    callback = compression(tmp_path, files=Files(float16=True))  # which rounds BatchNorm's buffers at the end, too
    model, run = Failing(), trainer(tmp_path, [callback, EMAWeightAveraging(decay=0.8)])
    if how == "after the fit":
        run.fit(model, datamodule=Corners())
    else:
        with pytest.raises(RuntimeError, match="stop"):
            run.fit(model, datamodule=Corners())
    run.save_checkpoint(tmp_path / "later.ckpt")

    plain = ToyNet.load_from_checkpoint(tmp_path / "later.ckpt")
    holds(plain, callback.session.latent.plan())
    if how == "after the fit":
        assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_an_average_of_tied_weights_holds_quantized_weights(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    callback = compression(tmp_path)
    fit(tmp_path, [callback, EMAWeightAveraging(decay=0.8), saver], TiedNet, enable_checkpointing=True)

    plain = TiedNet.load_from_checkpoint(tmp_path / "ckpt" / "epoch=6.ckpt")
    assert "second.weight" in callback.session.latent.parameters
    holds(plain, callback.session.latent.plan())


@pytest.mark.parametrize("kind", ["ema", "mean", "swa"])
def test_a_fit_that_was_already_over_exports_the_average(tmp_path, kind):
    make_model, make = AVERAGING[kind]
    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    whole = tmp_path / "whole"
    model, _ = fit(whole, [compression(whole), make(), saver], make_model, enable_checkpointing=True)

    again = tmp_path / "again"
    path = str(tmp_path / "ckpt" / "epoch=7.ckpt")
    resumed, _ = fit(again, [compression(again), make()], make_model, ckpt_path=path)

    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_an_average_is_what_a_metric_measures_even_if_nothing_is_compressed(tmp_path):
    """The export alone keeps the best average."""
    shown = {}

    class Record(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args, **kwargs):
            shown[trainer.current_epoch] = {name: each.clone() for name, each in pl_module.state_dict().items()}

    callback = CompressedExport(export_dir=str(tmp_path), metric="val_acc", export="best", mode="max")
    fit(tmp_path, [EMAWeightAveraging(decay=0.8), callback, Record()], max_epochs=3)

    reloaded = load_compressed(tmp_path / "model.safetensors", ToyNet())
    for name, tensor in shown[int(callback.report.exported_epoch) - 1].items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
