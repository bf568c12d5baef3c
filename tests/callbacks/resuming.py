"""A fit whose plain twin resumes bit for bit, also inside an epoch; shared by the tests of interrupted fits."""

import json
import os
import signal

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from toy import Corners, EpochSampler, ToyNet, fit


class ResumableLoader(DataLoader):
    """Goes on after the batches that a checkpoint had seen, as torchdata's StatefulDataLoader does."""

    begun = 0
    skip = 0

    def __iter__(self):
        self.begun, skip, self.skip = self.skip, self.skip, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= skip:
                self.begun = index + 1
                yield batch

    def state_dict(self):
        return {"batches": self.begun}

    def load_state_dict(self, state):
        self.skip = state["batches"] % len(self)


class ResumableCorners(Corners):
    def train_dataloader(self):
        return ResumableLoader(self.data, batch_size=self.batch_size, sampler=EpochSampler(len(self.data)))


class ScoredNet(ToyNet):
    """Says when it is being scored."""

    scored = 0

    def relevance_step(self, batch, batch_idx):
        self.scored += 1
        return self(batch[0]).gather(1, batch[1].unsqueeze(1))


class Kill(Callback):
    """SIGKILL, with no chance to clean up, at the n-th call of a hook, or of `relevance_step`."""

    def __init__(self, hook, count):
        self.count = count
        if hook != "scoring":
            setattr(self, hook, self._call)
        self.scoring = hook == "scoring"

    def _call(self, *args, **kwargs):
        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def setup(self, trainer, pl_module, stage):
        if not self.scoring:
            return
        scored, call = pl_module.relevance_step, self._call

        def relevance_step(batch, batch_idx):
            call()
            return scored(batch, batch_idx)

        pl_module.relevance_step = relevance_step


def run(folder, callbacks, ckpt_path=None, every="epoch", **settings):
    """One fit of 8 epochs of 4 batches, with a checkpoint at every epoch or batch."""
    often = {"every_n_epochs": 1} if every == "epoch" else {"every_n_train_steps": 1}
    saver = ModelCheckpoint(dirpath=folder / "ckpt", filename="{step:03d}", save_top_k=-1, **often)
    model, _ = fit(
        folder, [*callbacks, saver], ScoredNet, ResumableCorners(), ckpt_path, enable_checkpointing=True, **settings
    )
    return model


def latest(folder):
    """The last checkpoint that a killed fit left."""
    return str(max((folder / "ckpt").glob("*.ckpt")))


def report_of(folder):
    """The report without its paths."""
    report = json.loads((folder / "report.json").read_text())
    for artifact in report["artifacts"]:
        del artifact["path"]
    return report
