"""Programs that tests run in processes of their own: `python distributed_runs.py PROGRAM FOLDER ACCELERATOR`.

What each rank ends with goes to `FOLDER/NAME.RANK.pt`.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import (
    Channels,
    CompressedExport,
    Distillation,
    Files,
    Quantization,
    RelevanceScoring,
    Scoring,
)
from lightning_xai_compress.errors import ArtifactError, RelevanceError
from lightning_xai_compress.relevance import RelevanceSums

from toy import Corners, ToyNet, compression, fit

SUMMED = ("lrp", "deeplift", "taylor", "fisher", "wanda")


class Seen(Metric):
    """How many samples it was shown, over all processes."""

    higher_is_better = True

    def __init__(self):
        super().__init__()
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, logits, target):
        self.count += len(target)

    def compute(self):
        return self.count


class Dicts(ToyNet):
    """What ddp gets back from `training_step` looks like what `forward` of others gives."""

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "logits": self(batch[0])}


class Unused(ToyNet):
    """With a layer that no batch reaches."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(3, 2)


class Tokens(L.LightningDataModule):
    """64 samples of three tokens of 16; the model knows four more."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(16, (64, 3), generator=generator)
        return DataLoader(TensorDataset(tokens, tokens.sum(1) % 4), batch_size=4)


class TokenNet(ToyNet):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Embedding(20, 32), nn.Identity(), nn.Identity()

    def forward(self, x):
        return self.head(self.first(x).mean(1))


class SickOnRankOne(ToyNet):
    """What is explained is not finite in one process only, once training has begun."""

    def relevance_step(self, batch, batch_idx):
        sick = self.trainer.global_rank == 1 and self.trainer.global_step > 0
        return self(batch[0]).gather(1, batch[1].unsqueeze(1)) * (torch.nan if sick else 1)


def by_rows(model, batches, layers):
    """A criterion of the user's: counts the samples that it is shown, and says so in the scores."""
    samples = sum(len(batch[1]) for batch in batches)
    weights = dict(model.named_parameters())
    return {name: torch.full_like(weights[name], float(samples)) for name in layers}


def failing_on_rank_one(model, batches, layers):
    trainer = model.trainer
    if trainer.global_rank == 1 and trainer.global_step > 0:
        raise RelevanceError("no idea")
    return by_rows(model, batches, layers)


class Ranks(L.Callback):
    """Saves what every rank ends with, from inside the process."""

    def __init__(self, folder, name, ours):
        self.folder, self.name, self.ours = folder, name, ours

    def on_fit_end(self, trainer, pl_module):
        session, stages = self.ours.session, self.ours.stages()
        plan = session.latent.plan()
        state = {
            "weights": pl_module.state_dict(),
            "keep": dict(plan.mask.keep),
            "bits": dict(plan.allocation.bits) if plan.allocation else {},
            "halted": session.halted,
            "history": [dict(event) for event in session.history],
            "report": self.ours.report.to_dict() if len(stages) >= 4 else {},
        }
        if session.scores is not None:
            state |= {
                "score": dict(session.scores.score),
                "relevance": dict(session.scores.relevance),
                "sensitivity": dict(session.scores.sensitivity),
                "samples": session.scores.samples,
                "batches": session.scores.batches,
            }
        state = move_data_to_device(state, "cpu")
        torch.save(state, f"{self.folder}/{self.name}.{trainer.global_rank}.pt")


def run(folder, name, ours, model=ToyNet, *, callbacks=(), **settings):
    defaults = {"strategy": "ddp", "devices": 2, "max_epochs": 6}
    return fit(folder, [ours, Ranks(folder, name, ours), *callbacks], model, **(defaults | settings))


def ddp(folder, device):
    """All scenarios of one launch: Lightning starts the second process with the first Trainer."""
    one = {"max_epochs": 1, **device}

    def scores(name, *, model=ToyNet, data=None, samples=64, baseline=0.0, **settings):
        scoring = Scoring(samples=samples, baseline=baseline)
        stage = RelevanceScoring(relevance_epochs=[0], scoring=scoring, **settings)
        run(folder, name, stage, model, data=data or Corners(), **one)

    for criterion in (*SUMMED, "magnitude", "random"):
        scores(f"score_{criterion}", criterion=criterion)
    scores("score_mean", criterion="deeplift", baseline="mean")
    scores("score_own", criterion=by_rows)
    scores("score_few", data=Corners(16))  # a single batch, which rank 0 takes

    scores("score_tokens", data=Tokens(), samples=8, model=TokenNet)  # two batches: most tokens are in neither

    run(folder, "plain", compression(f"{folder}/plain", metric="val_acc"), **device)
    run(folder, "accumulated", compression(f"{folder}/accumulated"), accumulate_grad_batches=2, **device)
    channels = Channels(channels=0.6, multiple=1, steps=3)
    run(folder, "channels", compression(f"{folder}/channels", structure="channel", channels=channels), **device)
    run(folder, "taught", compression(f"{folder}/taught", distillation=Distillation()), Dicts, **device)
    average = L.pytorch.callbacks.EMAWeightAveraging(decay=0.8)
    run(folder, "averaged", compression(f"{folder}/averaged", metric="val_acc"), callbacks=[average], **device)
    run(
        folder,
        "unused",
        compression(f"{folder}/unused", exclude=["idle"]),
        Unused,
        strategy="ddp_find_unused_parameters_true",
        **device,
    )
    files = Files(activations="int8")
    run(
        folder,
        "uneven",
        compression(
            f"{folder}/uneven",
            metric=Seen(),
            formats=["safetensors", "onnx"],
            files=files,
            quantization=Quantization(activations="int8"),
        ),
        data=Corners(65),
        **device,
    )
    run(
        folder,
        "accuracy",
        compression(f"{folder}/accuracy", metric=MulticlassAccuracy(4, average="micro"), export="best"),
        data=Corners(65),
        max_epochs=3,
        **device,
    )
    run(folder, "sick", compression(f"{folder}/sick"), SickOnRankOne, **device)
    own = compression(f"{folder}/failing", criterion=failing_on_rank_one)
    run(folder, "failing", own, max_epochs=2, **device)

    saving = L.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    run(folder, "whole", compression(f"{folder}/whole"), callbacks=[saving], enable_checkpointing=True, **device)
    for step in (4, 8):  # while it is pruned, and after it was quantized
        ours = compression(f"{folder}/resumed_{step}")
        run(folder, f"resumed_{step}", ours, ckpt_path=f"{folder}/step={step}.ckpt", **device)

    Path(folder, "file").write_text("no folder")
    try:
        run(folder, "refused", compression(f"{folder}/file/out"), **device)
    except ArtifactError as error:
        torch.save(str(error), f"{folder}/refused.{os.environ.get('LOCAL_RANK', '0')}.pt")
    try:
        ours = compression(f"{folder}/parallel")
        run(folder, "parallel", ours, Counting, strategy=ModelParallelStrategy(), **device)
    except ValueError as error:
        torch.save([str(error), Counting.batches], f"{folder}/parallel.{os.environ.get('LOCAL_RANK', '0')}.pt")


class Counting(ToyNet):
    batches = 0

    def training_step(self, batch, batch_idx):
        Counting.batches += 1
        return super().training_step(batch, batch_idx)


class Raising(L.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise RuntimeError("stop")


def spawn(folder, device):
    """Fits in workers, one after the other with the same callback; what the caller sees goes to `caller.pt`."""
    ours = compression(f"{folder}/spawn", metric="val_acc")
    seen = {"pid": os.getpid()}
    model, _ = run(folder, "spawn", ours, strategy="ddp_spawn", **device)
    seen["report"], seen["weights"] = ours.report.to_dict(), model.state_dict()
    seen["same_again"] = ours.report == ours.report
    shutil.copy(f"{folder}/spawn/model.safetensors", f"{folder}/first.safetensors")

    # forked workers need no imports, but cannot have CUDA
    again = "ddp_fork" if device["accelerator"] == "cpu" else "ddp_spawn"
    try:
        run(folder, "raising", ours, strategy=again, callbacks=[Raising()], **device)
    except Exception as error:
        seen["raised"] = str(error)
    seen["report_after_raising"] = ours.report
    run(folder, "fork", ours, strategy=again, max_epochs=4, **device)
    seen["report_of_fork"] = ours.report.to_dict()
    run(folder, "trial", ours, strategy=again, fast_dev_run=True, **device)
    seen["report_of_trial"] = ours.report.to_dict()
    stage = RelevanceScoring(relevance_epochs=[0], scoring=Scoring(samples=64))
    run(folder, "score_spawn", stage, strategy=again, max_epochs=1, **device)
    run(folder, "unread", ours, strategy=again, max_epochs=4, **device)
    try:  # nobody has looked at the report of the fit before
        run(folder, "raising", ours, strategy=again, callbacks=[Raising()], **device)
    except Exception as error:
        seen["raised_again"] = str(error)
    seen["report_after_raising_unread"] = ours.report
    torch.save(seen, f"{folder}/caller.pt")


class Dying(L.Callback):
    """Ends one process, or raises in it, at a moment of the fit."""

    def __init__(self, moment, rank):
        self.moment, self.rank = moment, rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank == self.rank:
            if self.moment == "exception":
                raise RuntimeError("only here")
            if self.moment == "training":
                os.kill(os.getpid(), signal.SIGKILL)


def killed_within_a_scoring_pass(model, batches, layers):
    next(iter(batches))
    if model.trainer.global_rank == 1 and model.trainer.global_step > 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return by_rows(model, batches, layers)


def kill_while_rank_zero_exports():
    write, finish = CompressedExport._write, CompressedExport.finish

    def slow(stage, *given):
        time.sleep(2)
        return write(stage, *given)

    def finished(stage, session):
        if session.trainer.global_rank == 1:
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()
        finish(stage, session)

    CompressedExport._write, CompressedExport.finish = slow, finished


def dies(moment, rank, folder, device):
    """A fit of which one of two processes is lost."""
    settings = {}
    if moment == "scoring":
        settings["criterion"] = killed_within_a_scoring_pass
    if moment == "sums":
        settings["scoring"] = Scoring(samples=64)
        sums = RelevanceSums.reduce

        def reduce(self, total):
            if int(os.environ["LOCAL_RANK"]) == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            sums(self, total)

        RelevanceSums.reduce = reduce
    if moment == "export":
        kill_while_rank_zero_exports()
    if moment == "folder":
        settings["export_dir"] = f"{folder}/file/out"
    fit(
        folder,
        [compression(f"{folder}/{moment}", **settings), Dying(moment, rank)],
        strategy="ddp",
        devices=2,
        max_epochs=4,
        **device,
    )


def fork(local, port, moment, rank, folder, device):
    """One process of a pair; its end is its exit code."""
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"LOCAL_RANK": str(local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    code = 1
    try:
        with open(f"{folder}/{moment}{rank}.{local}.txt", "w") as text:
            os.dup2(text.fileno(), 2)
            dies(moment, rank, folder, device)
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pids, until):
    """Exit codes (negative: signals); None, and an end to it, for processes that do not end by then."""
    codes = [None for _ in pids]
    while None in codes and time.monotonic() < until:
        time.sleep(0.05)
        for index, pid in enumerate(pids):
            if codes[index] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                codes[index] = os.waitstatus_to_exitcode(status) if ended else None
    for pid, code in zip(pids, codes, strict=True):
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return codes


LOST = [("training", 1), ("training", 0), ("scoring", 1), ("sums", 1), ("export", 1)]
LOST += [("exception", 1), ("exception", 0), ("folder", 0)]


def lost(folder, device):
    """Pairs of processes that nobody watches, as under a cluster's own launcher; then one that Lightning launches."""
    if (
        "LOCAL_RANK" not in os.environ and device["accelerator"] == "cpu"
    ):  # without a watcher, nccl waits for its timeout
        Path(folder, "file").write_text("no folder")
        ends = {}
        for moment, rank in LOST:
            started = time.monotonic()
            port = find_free_network_port()
            pids = [fork(each, port, moment, rank, folder, device) for each in range(2)]
            codes = wait(pids, started + 60)
            ends[f"{moment} {rank}"] = {"codes": codes, "seconds": time.monotonic() - started}
        Path(folder, "ends.json").write_text(json.dumps(ends))
    if "LOCAL_RANK" not in os.environ:
        Path(folder, "begun").touch()
    dies("training", 1, folder, device)


if __name__ == "__main__":
    program, target = sys.argv[1:3]
    hardware = {"accelerator": sys.argv[3]}
    if hardware["accelerator"] == "gpu":
        hardware["deterministic"] = "warn"
    {"ddp": ddp, "spawn": spawn, "lost": lost}[program](target, hardware)
