"""A task small enough for fits of a second: where is the bright corner of a noisy 6x6 image."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_xai_compress import Pruning, Scoring, XAICompression
from lightning_xai_compress.callbacks.session import Session

ACCELERATOR = "cpu"


class EpochSampler(Sampler):
    """An order drawn from the epoch alone: a plain fit resumes bit for bit."""

    def __init__(self, length):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Corners(L.LightningDataModule):
    def __init__(self, samples=64, batch_size=16):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        y = torch.arange(samples) % 4
        x = torch.randn(samples, 1, 6, 6, generator=generator) * 0.3
        for index, label in enumerate(y.tolist()):
            row, column = 3 * (label // 2), 3 * (label % 2)
            x[index, 0, row : row + 3, column : column + 3] += 1.0
        self.data = TensorDataset(x, y)
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch_size, sampler=EpochSampler(len(self.data)))

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=32)


class ToyNet(L.LightningModule):
    """Two convolutions with BatchNorm and a Linear: 8*9 + 8*8*9 + 8*4*4 = 776 weights."""

    def __init__(self, lr=0.05, momentum=0.9):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(32, 4)
        self.lr, self.momentum = lr, momentum
        self.losses = []

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.avg_pool2d(F.relu(self.second(x)), 3)
        return self.head(x.flatten(1))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=1e-3)


class TiedNet(ToyNet):
    """Two names for one weight."""

    def __init__(self):
        super().__init__()
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.third.weight = self.second.weight

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.avg_pool2d(F.relu(self.third(F.relu(self.second(x)))), 3)
        return self.head(x.flatten(1))


def watch_scores(monkeypatch):
    """A list of what every scoring pass of a fit finds: the session itself lets go of scores once they are used."""
    found = []
    rescore = Session.rescore

    def watched(session, batch):
        found.append(rescore(session, batch))
        return found[-1]

    monkeypatch.setattr(Session, "rescore", watched)
    return found


def compression(folder, **settings):
    """All stages with settings small enough for a toy."""
    defaults = {
        "sparsity": 0.5,
        "average_bits": 3.0,
        "export_dir": str(folder),
        "scoring": Scoring(samples=32),
        "pruning": Pruning(steps=6),
    }
    return XAICompression(**(defaults | settings))


def trainer(folder, callbacks=(), **settings):
    defaults = {
        "max_epochs": 8,
        "accelerator": ACCELERATOR,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return L.Trainer(callbacks=list(callbacks), **(defaults | settings))


def fit(folder, callbacks, model=ToyNet, data=None, ckpt_path=None, **settings):
    """One seeded fit of a module, or of a class that is made under the seed; returns module and trainer."""
    torch.manual_seed(0)
    model = model() if isinstance(model, type) else model
    run = trainer(folder, callbacks, **settings)
    run.fit(model, datamodule=data or Corners(), ckpt_path=ckpt_path)
    return model, run
