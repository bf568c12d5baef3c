"""A checkpoint of a compressed fit is enough to export it again."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_xai_compress import ArtifactError, load_compressed, save
from lightning_xai_compress.callbacks.checkpoint import plan_of
from lightning_xai_compress.formats import Inputs, file_format

from toy import ToyNet, compression, fit


@pytest.fixture(scope="module")
def compressed_fit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    callback = compression(folder, exclude=["first"])
    checkpoints = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_last=True, save_top_k=-1)
    model, _ = fit(folder, [callback, checkpoints], enable_checkpointing=True)
    return folder, callback, model


def load(path):
    return torch.load(path, weights_only=True)


def test_the_plan_is_the_one_that_the_callback_exported(compressed_fit):
    folder, callback, _ = compressed_fit

    plan, own = plan_of(load(folder / "last.ckpt")), callback.session.latent.plan(tuple(callback.session.skipped))

    assert plan.skipped == own.skipped
    assert plan.mask.keep.keys() == own.mask.keep.keys() == {"second.weight", "head.weight"}
    assert plan.allocation.channel_size == own.allocation.channel_size
    for ours, theirs in (
        (plan.mask.keep, own.mask.keep),
        (plan.allocation.bits, own.allocation.bits),
        (plan.scales, own.scales),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_export_from_the_checkpoint_is_the_file_of_the_fit(compressed_fit, tmp_path):
    folder, _, model = compressed_fit
    checkpoint = load(folder / "last.ckpt")
    again = ToyNet()
    again.load_state_dict(checkpoint["state_dict"])

    formats = ("safetensors", "onnx", "pt2")
    artifacts = save(
        again, plan_of(checkpoint), tmp_path, formats=formats, examples=[Inputs((torch.randn(2, 1, 6, 6),))]
    )

    assert [artifact.max_abs_diff for artifact in artifacts][::2] == [0.0, 0.0]
    assert artifacts[1].max_abs_diff < 1e-5
    state = load_compressed(tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    ours, theirs = (
        file_format(path).read(path).tensors for path in (tmp_path / "model.safetensors", folder / "model.safetensors")
    )
    for one, other in zip(ours, theirs, strict=True):  # all but where they come from
        assert (one.name, one.bits, one.bytes) == (other.name, other.bits, other.bytes)
        assert torch.equal(one.values, other.values)


def test_a_checkpoint_between_pruning_and_quantization_has_a_mask_alone(compressed_fit):
    folder, *_ = compressed_fit

    plan = plan_of(load(folder / "epoch=3.ckpt"))

    assert plan.allocation is None
    assert plan.scales == {}
    assert 0 < plan.mask.sparsity < 0.6


def test_what_was_not_pruned_is_kept(tmp_path):
    weight = torch.randn(3, 4)
    latent = {"keep": {}, "bits": {"w": torch.tensor([2, 4, 8])}, "scales": {"w": torch.ones(3)}, "latents": {}}

    plan = plan_of({"state_dict": {"w": weight}, "callbacks": {"XAICompression": {"latent": latent}}})

    assert plan.mask["w"].all()
    assert plan.mask["w"].shape == (3, 4)
    assert plan.allocation.channel_size == {"w": 4}


def test_a_checkpoint_of_before_the_compression_is_refused(compressed_fit):
    folder, *_ = compressed_fit

    with pytest.raises(ArtifactError, match=r"nothing was pruned or quantized yet .*\(epoch 0, step 4\): give one of"):
        plan_of(load(folder / "epoch=0.ckpt"))


def test_a_checkpoint_of_a_plain_fit_is_refused(tmp_path):
    checkpoints = ModelCheckpoint(dirpath=tmp_path, filename="plain")
    fit(tmp_path, [checkpoints], enable_checkpointing=True, max_epochs=1)

    with pytest.raises(
        ArtifactError, match=r"of a fit without compression: expected .*got ModelCheckpoint; give a full"
    ):
        plan_of(load(tmp_path / "plain.ckpt"))


@pytest.mark.parametrize("what", [{"weight": torch.ones(2)}, [1, 2]])
def test_what_is_no_checkpoint_is_refused(what):
    with pytest.raises(
        ArtifactError, match=r"expected a Lightning checkpoint with a 'state_dict', got (\['weight'\]|list)"
    ):
        plan_of(what)


DAMAGES = {
    "of two models": ({"keep": {"v": torch.ones(3, 4, dtype=torch.bool)}}, "compressed v, but its state_dict lacks it"),
    "another mask": (
        {"keep": {"w": torch.ones(3, 5, dtype=torch.bool)}},
        r"keep of w has shape \(3, 5\), expected \(3, 4\)",
    ),
    "other rows": ({"bits": {"w": torch.tensor([2])}, "scales": {"w": torch.ones(3)}}, r"bits of w has shape \(1,\)"),
    "no scales": ({"bits": {"w": torch.tensor([2, 2, 2])}}, "bit widths and scales name different parameters"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(damage):
    latent, reason = DAMAGES[damage]

    with pytest.raises(ArtifactError, match=reason):
        plan_of({"state_dict": {"w": torch.ones(3, 4)}, "callbacks": {"Pruning": {"latent": latent}}})
