"""Networks for the formats that trace: one that can be traced, and some that cannot."""

import torch
from torch import nn


def cnn():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return net


class OnData(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


class FixedBatch(OnData):
    def forward(self, x):
        return self.fc(x).reshape(3, 2)


class SecondReference(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.weights = [self.fc.weight]

    def forward(self, x):
        return x @ self.weights[0].t()


class Reused(nn.Module):
    """One layer called twice, one registered twice, and a weight tied to an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.again = self.mix
        self.unembed = nn.Linear(6, 11)
        self.unembed.weight = self.embed.weight

    def forward(self, tokens):
        return self.unembed(self.again(self.mix(self.embed(tokens)).tanh()))
