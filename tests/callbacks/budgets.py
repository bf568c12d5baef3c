"""A network with some thousand weights, of which a file of a tenth of the size is still a network."""

import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn

from lightning_xai_compress import Scoring, XAICompression

from toy import ToyNet


class WideNet(ToyNet):
    """36*64 + 64*64 + 64*4 = 6,656 weights."""

    def __init__(self, lr=0.05, momentum=0.9):
        super().__init__(lr, momentum)
        del self.second, self.norm
        self.first = nn.Linear(36, 64)
        self.middle = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(F.relu(self.middle(F.relu(self.first(x.flatten(1))))))


def budgeted(folder, **settings):
    return XAICompression(**({"export_dir": str(folder), "scoring": Scoring(samples=32)} | settings))


class Stop(Callback):
    """Saves a checkpoint after so many epochs of a longer fit, and ends it."""

    def __init__(self, epochs, path):
        self.epochs, self.path = epochs, path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
