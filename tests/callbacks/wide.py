"""A network with channels to lose, and fits that remove some."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_xai_compress import Channels
from lightning_xai_compress.structure import macs_of

from toy import Corners, ToyNet, compression


class WideNet(ToyNet):
    """With enough channels to lose some: a residual block between two convolutions."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.first, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.second, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(64, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = x + self.outer(F.relu(self.inner(x)))
        x = F.avg_pool2d(F.relu(self.second(x)), 3)
        return self.head(x.flatten(1))


def structured(folder, **settings):
    channels = Channels(**{"macs": 0.5, "steps": 3, "multiple": 4} | settings.pop("channels", {}))
    return compression(folder, **{"structure": "channel", "channels": channels, "sparsity": 0.2} | settings)


def macs(model):
    model = model.eval()
    counted, rest = macs_of(model, lambda: model(torch.randn(2, 1, 6, 6)))
    return sum(counted.values()) + rest


def logits(model):
    with torch.no_grad():
        return model.eval()(Corners().data.tensors[0])
