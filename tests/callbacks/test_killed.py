"""A fit that was killed ends, resumed from its last checkpoint, like one that was not: bit for bit."""

import multiprocessing
import signal

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import Quantization

from resuming import Kill, latest, report_of, run
from toy import compression

SETTINGS = {
    # a metric that is measured at the end, since Lightning does not make up for the validation of an epoch when it
    # resumes from a checkpoint of that epoch's last batch
    "last": {"metric": MulticlassAccuracy(4, average="micro")},
    "best, scores kept, 8-bit activations": {
        "metric": "val_acc",
        "export": "best",
        "mode": "max",
        "quantization": Quantization(activations="int8"),
        "relevance_epochs": [1, 3, 5],
    },
}
pytestmark = pytest.mark.xdist_group("killed")  # the uninterrupted fit is run once for many tests
# batches 0-7 are warm-up, 8-18 pruning (a step at 8, 9, 11, 13, 15, 17), quantized from 19 to 31
MOMENTS = {
    "warm-up": ("on_train_batch_end", 6),
    "scoring": ("scoring", 6),
    "pruning, inside an epoch": ("on_train_batch_end", 14),
    "before a step, latents open": ("on_before_optimizer_step", 23),
    "quantized training": ("on_train_batch_end", 27),
    "validation": ("on_validation_batch_end", 13),
    "after an epoch": ("on_train_epoch_end", 6),
    "export": ("on_train_end", 1),
}


def compressing(folder, settings):
    return compression(folder, **settings)


def killed(folder, moment, every, settings):
    """In a process of its own."""
    torch.set_num_threads(1)
    run(folder, [Kill(*moment), compressing(folder, settings)], every=every)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Several cost toys time, and sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processes():
    """New processes without the seconds of imports; forked from a server that never ran torch's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resuming"])
    return context


@pytest.fixture(scope="module", params=SETTINGS)
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    callback = compressing(folder, SETTINGS[request.param])
    return folder, run(folder, [callback]), callback, SETTINGS[request.param]


def assert_equal(folder, model, callback, twin_folder, twin, twin_callback):
    for name, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    parts, twins = (each.session.latent.state_dict() for each in (callback, twin_callback))
    for part, tensors in twins.items():
        assert parts[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(parts[part][name], tensor), (part, name)
    assert report_of(folder) == report_of(twin_folder)
    assert (folder / "model.safetensors").read_bytes() == (twin_folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_fit_resumed_from_its_last_checkpoint_ends_like_an_uninterrupted_one(
    uninterrupted, processes, tmp_path, moment
):
    """With a checkpoint at every epoch, or with the other settings at every batch."""
    whole, twin, twin_callback, settings = uninterrupted
    every = "batch" if "export" in settings else "epoch"
    process = processes.Process(target=killed, args=(tmp_path, MOMENTS[moment], every, settings))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "report.json").exists()

    callback = compressing(tmp_path, settings)
    model = run(tmp_path, [callback], latest(tmp_path), every=every)

    assert_equal(tmp_path, model, callback, whole, twin, twin_callback)


@pytest.mark.parametrize("every", ["epoch", "batch"])
def test_the_plain_twin_resumes_bit_for_bit(tmp_path, every):
    """Without this, nothing could be asked of the compressed fit."""
    whole = run(tmp_path, [], every=every)
    for path in sorted((tmp_path / "ckpt").glob("*.ckpt"))[:-1][::3]:
        resumed = run(tmp_path / "again", [], str(path), every=every)
        assert all(torch.equal(resumed.state_dict()[name], each) for name, each in whole.state_dict().items())


@pytest.mark.parametrize("step", [6, 9, 14, 18, 19, 27, 32])
def test_a_fit_resumed_inside_any_epoch_ends_like_an_uninterrupted_one(uninterrupted, tmp_path, step):
    whole, twin, twin_callback, settings = uninterrupted
    if not (whole / "steps").exists():
        run(whole / "steps", [compressing(whole / "steps", settings)], every="batch")

    callback = compressing(tmp_path, settings)
    model = run(tmp_path, [callback], str(whole / "steps" / "ckpt" / f"step={step:03d}.ckpt"))

    assert_equal(tmp_path, model, callback, whole, twin, twin_callback)


def test_a_fit_that_was_already_over_is_exported_from_its_last_checkpoint(uninterrupted, tmp_path):
    """As after a kill between the last checkpoint and the export."""
    whole, twin, twin_callback, settings = uninterrupted

    callback = compressing(tmp_path, settings)
    model = run(tmp_path, [callback], latest(whole))

    assert_equal(tmp_path, model, callback, whole, twin, twin_callback)
