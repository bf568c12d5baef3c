"""What several processes need of the callbacks, seen from one."""

import copy
import gc
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from torch import nn
from torch.distributed import device_mesh, tensor
from torch.utils.data import DataLoader, DistributedSampler, Subset, SubsetRandomSampler, TensorDataset

from lightning_xai_compress import Quantization, score
from lightning_xai_compress.callbacks.outcome import Outcome
from lightning_xai_compress.callbacks.processes import Processes, check_strategy, unpadded
from lightning_xai_compress.formats import load_compressed
from lightning_xai_compress.report import Report

from toy import Corners, ToyNet, compression, fit

INSTEAD = "use Trainer.strategy='auto'. for one device, or strategy='ddp' or 'ddp_spawn' for several"


class DataParallelStrategy:
    """As Lightning 1 had it."""


class MegatronStrategy(DDPStrategy):
    """As NeMo has it."""


def bare(kind):
    """A strategy that is not set up: some need a GPU, or a library, for that."""
    return kind.__new__(kind)


@pytest.mark.parametrize("name", StrategyRegistry.available_strategies())
def test_every_strategy_that_lightning_knows_by_name_is_understood_or_refused(name):
    strategy = bare(StrategyRegistry[name]["strategy"])
    if name.startswith("ddp") or name == "single_device":
        check_strategy(strategy)
    else:
        with pytest.raises(ValueError, match=rf"{type(strategy).__name__} is not supported: .*; {INSTEAD}"):
            check_strategy(strategy)


@pytest.mark.parametrize(
    "kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, DataParallelStrategy, MegatronStrategy]
)
def test_strategies_that_split_the_model_are_refused_before_training(tmp_path, kind):
    callback, model = compression(tmp_path / "out"), ToyNet()
    trainer = SimpleNamespace(strategy=bare(kind), callbacks=[callback])

    text = f"{kind.__name__} is not supported: weights must be whole on every device, and no part of them elsewhere"
    with pytest.raises(ValueError, match=text):
        callback.setup(trainer, model, "fit")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_sharded_strategies_of_another_make_are_refused_in_a_fit(tmp_path, name):
    model = ToyNet()
    strategy = type(name, (SingleDeviceStrategy,), {})("cpu")
    with pytest.raises(ValueError, match=f"{name} is not supported: weights must be whole on every device.*{INSTEAD}"):
        fit(tmp_path, [compression(tmp_path)], model, strategy=strategy)
    assert model.losses == []


def test_processes_that_train_apart_and_average_are_refused():
    with pytest.raises(ValueError, match=r"DDPStrategy with model_averaging_period .* leave model_averaging_period"):
        check_strategy(DDPStrategy(model_averaging_period=4))


def test_weights_that_someone_else_has_sharded_are_refused_before_training(tmp_path):
    model = ToyNet()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = device_mesh.init_device_mesh("cpu", (1,))
        model.head.weight = nn.Parameter(tensor.distribute_tensor(model.head.weight.detach(), mesh))
        with pytest.raises(ValueError, match=r"head.weight is a shard .DTensor., but weights must be whole"):
            fit(tmp_path, [compression(tmp_path)], model, num_sanity_val_steps=0)
    finally:
        torch.distributed.destroy_process_group()
    assert model.losses == []


# --- buffers


class Queue(nn.BatchNorm1d):
    """Keeps a buffer beside the statistics."""

    def __init__(self):
        super().__init__(3)
        self.register_buffer("queue", torch.zeros(2))


def test_only_batchnorm_statistics_are_taken_from_rank_zero(monkeypatch):
    model = nn.Sequential(Queue(), nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3))
    model.append(nn.BatchNorm1d(3, track_running_stats=False))
    model.register_buffer("counter", torch.zeros((), dtype=torch.long))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: tensor.fill_(7))
    two = Processes(SimpleNamespace(global_rank=1, world_size=2, strategy=None))

    two.share_buffers(model)

    shared = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert shared == {f"{i}.{part}" for i in (0, 2) for part in ("running_mean", "running_var", "num_batches_tracked")}
    assert all((buffer == 7).all() for name, buffer in model.named_buffers() if name in shared)


# --- validation data


def shares(loader_of, replicas):
    return [[int(x) for (batch,) in unpadded(loader_of(rank)) for x in batch] for rank in range(replicas)]


@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize("samples", [8, 9, 65])
@pytest.mark.parametrize("settings", [{"shuffle": False}, {"shuffle": True, "seed": 3}, {"drop_last": True}])
def test_shares_of_the_validation_data_hold_every_sample_once(samples, replicas, settings):
    data = TensorDataset(torch.arange(samples))

    def loader(rank):
        sampler = DistributedSampler(data, num_replicas=replicas, rank=rank, **settings)
        return DataLoader(data, batch_size=4, sampler=sampler)

    parts = shares(loader, replicas)

    assert sorted(each for part in parts for each in part) == list(range(samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for rank, part in enumerate(parts):  # as the sampler would share them out, but for what it repeats
        own = list(loader(rank).sampler)
        assert part[: samples // replicas] == own[: samples // replicas]


def test_a_sampler_of_the_user_under_lightnings_wrapper_is_shared_out_and_left_alone():
    data, chosen = TensorDataset(torch.arange(20)), [3, 1, 4, 15, 9, 2, 6]

    def loader(rank):
        sampler = DistributedSamplerWrapper(Fixed(chosen), num_replicas=2, rank=rank, shuffle=False)
        return DataLoader(data, batch_size=2, sampler=sampler)

    training = loader(0)
    iterator = iter(training)
    next(iterator)
    assert sum(1 for _ in unpadded(training)) == 2

    assert shares(loader, 2) == [[3, 4, 9, 6], [1, 15, 2]]
    assert [x.tolist() for (x,) in iterator] == [[9, 6]]


class Fixed(SubsetRandomSampler):
    def __iter__(self):
        return iter(self.indices)


def test_with_fewer_samples_than_processes_none_is_left_without():
    data = TensorDataset(torch.arange(2))

    def loader(rank):
        return DataLoader(data, sampler=DistributedSampler(data, num_replicas=3, rank=rank, shuffle=False))

    assert shares(loader, 3) == [[0], [1], [0]]


def test_other_loaders_are_left_as_they_are():
    class Own(DataLoader):
        def __iter__(self):
            return iter([])

    data = TensorDataset(torch.arange(3))
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    even = DataLoader(data, sampler=DistributedSampler(Subset(data, [0, 1]), num_replicas=2, rank=0))

    for loader in (DataLoader(data), Own(data, sampler=sampler), even):
        assert unpadded(loader) is loader


# --- pickling, and the report


def settings(folder):
    return compression(folder, quantization=Quantization(activations="int8"))


def test_a_callback_goes_through_pickle_before_and_after_a_fit(tmp_path):
    plain, fresh = settings(tmp_path / "a"), pickle.loads(pickle.dumps(settings(tmp_path / "b")))
    expected, _ = fit(tmp_path, [plain])
    again = pickle.loads(pickle.dumps(plain))
    again._export.export_dir = str(tmp_path / "c")

    for callback in (fresh, again):
        model, _ = fit(tmp_path, [callback])
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert callback.report.layers == plain.report.layers


def test_a_pickled_callback_carries_no_model(tmp_path):
    callback = settings(tmp_path)
    before = len(pickle.dumps(callback))
    fit(tmp_path, [callback])

    copied = pickle.loads(pickle.dumps(callback))

    assert copied.session is None
    assert copied.report == callback.report
    assert len(pickle.dumps(callback)) < before + 4_000  # the report, and ranges
    assert b"ToyNet" not in pickle.dumps(callback)
    assert copy.deepcopy(callback).report == callback.report


def test_a_written_report_reads_back_equal(tmp_path):
    callback = compression(tmp_path, metric="val_acc")
    fit(tmp_path, [callback])

    read = Report.read(tmp_path / "report.json")

    assert read == callback.report
    assert type(read.layers[0].bits) is dict
    assert read.sizes.dense.fp32 > 0


class Broken(Corners):
    def setup(self, stage):
        raise RuntimeError("no data")


def test_a_fit_that_fails_leaves_no_report_of_an_earlier_one(tmp_path):
    callback = compression(tmp_path)
    fit(tmp_path, [callback])
    assert callback.report is not None

    with pytest.raises(RuntimeError, match="no data"):  # before any hook of the callback
        fit(tmp_path, [callback], data=Broken())

    assert callback.report is None


def test_a_validation_that_fails_takes_no_report_away(tmp_path):
    callback = compression(tmp_path)
    model, run = fit(tmp_path, [callback])

    with pytest.raises(RuntimeError, match="no data"):
        run.validate(model, datamodule=Broken())

    assert callback.report is not None


WORKER = """
import multiprocessing, os, pickle, sys
from lightning_xai_compress.callbacks.outcome import Outcome

def work(outcome, report, leave):
    outcome.begin(leave=leave)
    outcome.keep(report, leave=leave)

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    report = pickle.loads(open(sys.argv[1], "rb").read())
    outcome, unread, other = Outcome(), Outcome(), Outcome()
    copied = pickle.loads(pickle.dumps(outcome))
    fits = [(outcome, False), (outcome, True), (unread, True)]
    for asked, leave in fits:
        worker = multiprocessing.Process(target=work, args=(asked, report, leave))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
        if not leave:
            assert asked.report is None
    assert copied.report is None and other.report is None
    files = os.listdir(sys.argv[2])
    assert [os.stat(f"{sys.argv[2]}/{name}").st_mode & 0o777 for name in files] == [0o600, 0o600]
    assert outcome.report == report and outcome.report == report
    assert len(os.listdir(sys.argv[2])) == 1
"""


@pytest.mark.slow
def test_a_report_of_a_worker_passes_through_a_private_file_that_does_not_stay(tmp_path):
    callback = compression(tmp_path / "out")
    fit(tmp_path, [callback])
    (tmp_path / "report.pickle").write_bytes(pickle.dumps(callback.report))
    (tmp_path / "script.py").write_text(WORKER)
    (tmp_path / "temporary").mkdir()

    result = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "report.pickle", tmp_path / "temporary"],
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert result.returncode == 0, result.stderr[-2000:]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_an_outcome_that_nobody_holds_leaves_no_file(tmp_path):
    outcome = Outcome()
    outcome._path.write_text("")
    path = outcome._path

    del outcome
    gc.collect()

    assert not path.exists()


# --- one GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a fit on one, against the file and the CPU")
def test_a_fit_on_one_gpu_ends_as_its_file_says_and_scores_as_the_cpu(tmp_path):
    callback = compression(tmp_path, metric="val_acc")
    model, _ = fit(tmp_path, [callback], accelerator="gpu", devices=1)

    reloaded = load_compressed(tmp_path / "model.safetensors", ToyNet()).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value.cpu(), reloaded[name]), name
    assert callback.report.sparsity == 0.5
    x, y = Corners().data.tensors
    there, here = score(model.cuda(), [(x.cuda(), y.cuda())]), score(model.cpu(), [(x, y)])
    for name, value in here.relevance.items():
        torch.testing.assert_close(there.relevance[name].cpu(), value, rtol=0.01, atol=0.01 * float(value.abs().max()))
