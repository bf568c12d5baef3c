"""Nothing is lost: NaN, interruption, an early end and a failing format leave good weights and say so."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import MixedPrecision as PrecisionPlugin
from torch.optim import optimizer as optimizers

from lightning_xai_compress import RelevanceError
from lightning_xai_compress.quantization import quantize

from toy import Corners, ToyNet, compression, fit, trainer


def test_nan_loss_stops_pruning_and_keeps_the_last_good_weights(tmp_path):
    class Poisoned(ToyNet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.nan if self.global_step in (11, 12) else loss

    callback = compression(tmp_path)
    with pytest.warns(UserWarning, match="pruning stops here and the last good weights are kept: loss or gradients"):
        model, _ = fit(tmp_path, [callback], Poisoned())

    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert 0 < callback.report.sparsity < 0.45
    assert callback.report.halted.startswith("loss or gradients are not finite at step 11")
    assert callback.report.artifacts[0].max_abs_diff == 0


def test_a_nan_image_does_not_poison_the_batchnorm_statistics(tmp_path):
    class Bad(Corners):
        def __init__(self):
            super().__init__()
            self.data.tensors[0][5] = torch.nan

    callback = compression(tmp_path)
    with pytest.warns(UserWarning, match="pruning stops here and the last good weights are kept"):
        model, _ = fit(tmp_path, [callback], data=Bad(), num_sanity_val_steps=0)

    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_nan_loss_behind_a_gradient_scaler_stops_pruning(tmp_path):
    class Poisoned(ToyNet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.nan if self.trainer.current_epoch == 3 else loss

    callback = compression(tmp_path)
    with pytest.warns(UserWarning, match="pruning stops here .* loss is not finite before step"):
        fit(tmp_path, [callback], Poisoned(), plugins=[PrecisionPlugin("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    assert callback.report.sparsity < 0.5


def test_relevance_that_is_zero_everywhere_stops_pruning(tmp_path):
    class Mute(ToyNet):
        def relevance_step(self, batch, batch_idx):
            return 0 * self(batch[0])

    callback = compression(tmp_path)
    with pytest.warns(UserWarning, match="relevance is zero everywhere"):
        fit(tmp_path, [callback], Mute())
    assert callback.report.sparsity == 0


def test_nan_relevance_stops_pruning_and_keeps_the_last_good_weights(tmp_path):
    class Poisoned(ToyNet):
        def relevance_step(self, batch, batch_idx):
            explained = self(batch[0]).gather(1, batch[1].unsqueeze(1))
            return explained * torch.nan if self.trainer.current_epoch == 3 else explained

    callback = compression(tmp_path)
    with pytest.warns(UserWarning, match="relevance is not finite: batch 0"):
        model, _ = fit(tmp_path, [callback], Poisoned())

    pruned = [event for event in callback.report.history if event["event"] == "pruned"]
    assert [event["epoch"] for event in pruned] == [2.0, 2.25, 2.75]
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert callback.report.average_bits is not None


def test_relevance_that_is_nan_from_the_start_is_refused(tmp_path):
    class Broken(ToyNet):
        def relevance_step(self, batch, batch_idx):
            return self(batch[0]) * torch.nan

    model = Broken()
    with pytest.raises(RelevanceError, match="relevance is not finite before the first batch"):
        fit(tmp_path, [compression(tmp_path)], model)
    assert model.losses == []


def watching():
    """Hooks that every optimizer of this process calls."""
    return {*optimizers._global_optimizer_pre_hooks, *optimizers._global_optimizer_post_hooks}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_fit_leaves_compressed_weights_and_no_hooks(tmp_path, error):
    class Failing(ToyNet):
        def training_step(self, batch, batch_idx):
            if self.global_step == 25:
                raise error("stop")
            return super().training_step(batch, batch_idx)

    callback = compression(tmp_path)
    model, before = Failing(), watching()
    with pytest.raises((error, SystemExit)):
        fit(tmp_path, [callback], model)

    plan = callback.session.latent.plan()
    for name, bits in plan.allocation.bits.items():
        for row, width in zip(dict(model.named_parameters())[name].detach().flatten(1), bits.tolist(), strict=True):
            assert len(row.unique()) <= 2**width - 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert watching() == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fit_interrupted_while_the_latents_are_open_leaves_compressed_weights(tmp_path, error):
    opened = []

    class Failing(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 25:
                opened.extend(name for name, value in expected() if not torch.equal(parameters[name], value))
                raise error("stop")

    def expected():
        state = callback.session.latent.state_dict()
        for name, latent in state["latents"].items():
            yield name, quantize(latent, state["bits"][name], state["scales"][name])

    callback = compression(tmp_path)
    torch.manual_seed(0)
    model, before = ToyNet(), watching()
    parameters = dict(model.named_parameters())
    with pytest.raises((error, SystemExit)):
        fit(tmp_path, [callback, Failing()], model)

    assert sorted(opened) == ["first.weight", "head.weight", "second.weight"]
    for name, value in expected():
        assert torch.equal(parameters[name], value), name
        assert (parameters[name][~callback.session.latent.mask()[name]] == 0).all(), name
    assert callback.session.latent.mask().sparsity == 0.5
    assert watching() == before


def test_a_fit_that_stops_early_says_what_is_missing_and_still_writes_the_model(tmp_path):
    stop = EarlyStopping("val_acc", mode="max", patience=1, stopping_threshold=0.0)
    callback = compression(tmp_path)
    with pytest.warns(
        UserWarning, match="the fit ended at epoch .* before RelevancePruning and MixedPrecision had done"
    ):
        fit(tmp_path, [callback, stop])
    assert callback.report.sparsity == 0
    assert (tmp_path / "model.safetensors").exists()


def test_a_format_that_fails_does_not_cost_the_others(tmp_path):
    class Untraceable(ToyNet):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > -1e9 else x.new_zeros(len(x), 4)

    callback = compression(tmp_path, formats=["onnx", "safetensors"])
    with pytest.warns(UserWarning, match="format 'onnx' was not written"):
        fit(tmp_path, [callback], Untraceable())

    assert [artifact.format for artifact in callback.report.artifacts] == ["safetensors"]
    assert callback.report.failed[0].name == "onnx"
    assert not (tmp_path / "model.onnx").exists()


def test_a_module_interrupted_in_a_fit_can_be_validated(tmp_path):
    class Failing(ToyNet):
        def training_step(self, batch, batch_idx):
            if self.global_step == 25:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    model, run = Failing(), trainer(tmp_path, [compression(tmp_path)])
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(model, datamodule=Corners())
    before = model.norm.running_mean.clone()

    run.validate(model, datamodule=Corners(), verbose=False)

    assert torch.equal(model.norm.running_mean, before)
