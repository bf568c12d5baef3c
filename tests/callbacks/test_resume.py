"""Interrupted and resumed equals uninterrupted, and what checkpoints hold."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_xai_compress import MixedPrecision, Pruning, Quantization, RelevancePruning
from lightning_xai_compress.callbacks.checkpoint import plan_of
from lightning_xai_compress.quantization import quantize

from toy import Corners, ToyNet, compression, fit


def checkpoints(folder, **settings):
    return ModelCheckpoint(dirpath=folder, filename="{epoch}-{step}", save_top_k=-1, **settings)


ALL_STATE = {"export": "best", "mode": "max", "quantization": Quantization(activations="int8")}


@pytest.fixture(scope="module", params=[{}, ALL_STATE], ids=["last", "best, 8-bit activations"])
def uninterrupted(request, tmp_path_factory):
    """A run of 8 epochs of 4 batches: pruning from batch 8, quantized from batch 19; checkpoints at every epoch."""
    folder = tmp_path_factory.mktemp("whole")
    saver = checkpoints(folder / "ckpt", every_n_epochs=1)
    callback = compression(folder, metric="val_acc", **request.param)
    model, _ = fit(folder, [callback, saver], enable_checkpointing=True)
    return folder, model, callback, request.param


@pytest.mark.parametrize("epoch", range(7))
def test_a_resumed_fit_ends_bit_for_bit_like_an_uninterrupted_one(uninterrupted, tmp_path, epoch):
    """Epochs 0-1 are warm-up, 2-4 pruning, 4-7 quantized."""
    folder, model, callback, settings = uninterrupted
    checkpoint = folder / "ckpt" / f"epoch={epoch}-step={4 * (epoch + 1)}.ckpt"
    resumed_callback = compression(tmp_path, metric="val_acc", **settings)

    resumed, _ = fit(tmp_path, [resumed_callback], model=ToyNet(), ckpt_path=str(checkpoint))

    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    plan, resumed_plan = callback.session.latent.plan(), resumed_callback.session.latent.plan()
    for name in plan.mask.keep:
        assert torch.equal(plan.mask[name], resumed_plan.mask[name])
        assert torch.equal(plan.allocation[name], resumed_plan.allocation[name])
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    reports = [json.loads((each / "report.json").read_text()) for each in (folder, tmp_path)]
    for report in reports:
        for artifact in report["artifacts"]:
            del artifact["path"]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("settings", [{}, {"relevance_epochs": [1, 4]}], ids=["scored at use", "scored at epochs"])
def test_a_fit_resumed_inside_an_epoch_continues_masks_bits_and_latents(tmp_path, settings):
    """Lightning restarts an epoch's batches after a mid-epoch checkpoint, so the twin is resumed from it as well."""
    folder = tmp_path / "whole"
    saver = checkpoints(folder / "ckpt", every_n_train_steps=1)
    callback = compression(folder, **settings)
    fit(folder, [callback, saver], enable_checkpointing=True)

    for epoch, step in ((2, 10), (4, 18), (5, 22)):
        state = torch.load(folder / "ckpt" / f"epoch={epoch}-step={step}.ckpt", weights_only=True)
        saved = state["callbacks"]["XAICompression"]
        ends = []
        for attempt in range(2):
            again = compression(tmp_path / f"{step}-{attempt}", **settings)
            ckpt = str(folder / "ckpt" / f"epoch={epoch}-step={step}.ckpt")
            model, _ = fit(tmp_path / f"{step}-{attempt}", [again], model=ToyNet(), ckpt_path=ckpt)
            ends.append(model.state_dict())
            for name, keep in saved["latent"]["keep"].items():
                assert not again.session.latent.mask()[name][~keep].any()
            for name, bits in saved["latent"]["bits"].items():
                assert torch.equal(again.session.latent.bits[name], bits)
            steps = [event for event in again.report.history if event["event"] == "pruned"]
            assert len(steps) == 6
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_compressed_checkpoint_loads_into_the_plain_module(tmp_path, weights_only):
    saver = checkpoints(tmp_path / "ckpt", every_n_epochs=1, save_weights_only=weights_only)
    model, _ = fit(tmp_path, [compression(tmp_path), saver], enable_checkpointing=True)

    plain = ToyNet.load_from_checkpoint(tmp_path / "ckpt" / "epoch=7-step=32.ckpt", strict=True)

    for name, tensor in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name


def test_a_checkpoint_of_a_dense_run_is_compressed_over_the_remaining_fit(tmp_path):
    saver = checkpoints(tmp_path / "ckpt", every_n_epochs=1)
    fit(tmp_path, [saver], enable_checkpointing=True, max_epochs=4)
    callback = compression(tmp_path)

    fit(tmp_path, [callback], ckpt_path=str(tmp_path / "ckpt" / "epoch=3-step=16.ckpt"), max_epochs=12)

    assert callback.report.sparsity == 0.5
    events = {event["event"]: event["epoch"] for event in reversed(callback.report.history)}
    assert events["pruned"] == 6  # a quarter into epochs 4 to 12
    assert events["quantized"] == 8.75


def test_checkpoints_hold_no_scores_unless_they_are_needed_again(tmp_path):
    saver = checkpoints(tmp_path / "ckpt", every_n_epochs=1)
    fit(tmp_path, [compression(tmp_path), saver], enable_checkpointing=True)

    state = torch.load(tmp_path / "ckpt" / "epoch=5-step=24.ckpt", weights_only=True)["callbacks"]["XAICompression"]
    assert "scores" not in state
    every = {"first.weight", "second.weight", "head.weight"}
    expected = dict.fromkeys(("keep", "bits", "scales", "latents", "ages"), every)
    assert {part: set(names) for part, names in state["latent"].items() if names} == expected


def test_the_same_callback_on_a_new_model_starts_afresh(tmp_path):
    callback = compression(tmp_path)
    first, _ = fit(tmp_path, [callback])
    second, _ = fit(tmp_path, [callback])

    fresh, _ = fit(tmp_path, [compression(tmp_path)])
    assert callback.report.sparsity == 0.5
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert second is not first


def test_stages_may_be_listed_in_another_order_on_resuming(tmp_path):
    def stages():
        return [RelevancePruning(sparsity=0.5, pruning=Pruning(steps=6)), MixedPrecision(average_bits=4.0)]

    saver = checkpoints(tmp_path / "ckpt", every_n_epochs=1)
    whole, _ = fit(tmp_path, [*stages(), saver], enable_checkpointing=True)
    resumed, _ = fit(tmp_path, stages()[::-1], ckpt_path=str(tmp_path / "ckpt" / "epoch=3-step=16.ckpt"))

    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_second_fit_of_the_same_trainer_and_model_goes_on_with_the_compressed_weights(tmp_path):
    callback = compression(tmp_path)
    model, run = fit(tmp_path, [callback])
    plan = callback.session.latent.plan()

    run.fit_loop.max_epochs = 10
    run.fit(model, datamodule=Corners())

    again = callback.session.latent.plan()
    for name in plan.mask.keep:
        assert torch.equal(plan.mask[name], again.mask[name])
        assert torch.equal(plan.allocation[name], again.allocation[name])
        assert not dict(model.named_parameters())[name][~plan.mask[name]].any()
    assert len(model.losses) == 10 * 4
    assert callback.report.artifacts[0].max_abs_diff == 0


def test_a_second_fit_with_other_weights_in_the_model_starts_afresh(tmp_path):
    callback = compression(tmp_path)
    model, run = fit(tmp_path, [callback])
    model.load_state_dict(ToyNet().state_dict())
    run.fit_loop.max_epochs = 16

    run.fit(model, datamodule=Corners())

    assert callback.session.clock.start == 32
    assert next(event["epoch"] for event in callback.report.history if event["event"] == "pruned") == 10


def test_the_same_trainer_with_another_model_starts_afresh(tmp_path):
    callback = compression(tmp_path)
    first, run = fit(tmp_path, [callback])
    kept = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    run.fit_loop.max_epochs = 16
    other = ToyNet()

    run.fit(other, datamodule=Corners())

    assert callback.report.sparsity == 0.5
    assert callback.session.module is other
    assert all(torch.equal(tensor, kept[name]) for name, tensor in first.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in first.modules())


def test_a_third_fit_after_one_that_failed_before_it_began_goes_on(tmp_path):
    class Empty(Corners):
        def train_dataloader(self):
            raise RuntimeError("no data today")

    callback = compression(tmp_path)
    model, run = fit(tmp_path, [callback])
    keep = callback.session.latent.mask().keep
    run.fit_loop.max_epochs = 10
    run.fit_loop._combined_loader = None
    with pytest.raises(RuntimeError, match="no data today"):
        run.fit(model, datamodule=Empty())

    run.fit(model, datamodule=Corners())

    assert len(model.losses) > 32
    for name, kept in callback.session.latent.mask().keep.items():
        assert torch.equal(kept, keep[name])
        assert not dict(model.named_parameters())[name][~kept].any()


def test_a_checkpoint_saved_after_testing_the_best_one_is_of_one_moment(tmp_path):
    class Tested(ToyNet):
        def test_step(self, batch, batch_idx):
            self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    best = ModelCheckpoint(dirpath=tmp_path / "ckpt", filename="{epoch}", monitor="compressed_val_loss", mode="min")

    class Falling(Tested):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    callback = compression(tmp_path, metric="val_loss")
    model, run = fit(tmp_path, [callback, best], Falling(), enable_checkpointing=True)
    run.test(model, DataLoader(Corners().data, batch_size=32), ckpt_path="best", verbose=False)
    run.save_checkpoint(tmp_path / "later.ckpt")

    state = torch.load(tmp_path / "later.ckpt", weights_only=True)
    plan = plan_of(state)
    for name, bits in plan.allocation.bits.items():
        weight = state["state_dict"][name]
        assert torch.equal(weight, quantize(weight, bits, plan.scales[name])), name
