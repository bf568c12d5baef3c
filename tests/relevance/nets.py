"""A small network with what usually goes wrong in it, and data for it."""

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """Convolutions with BatchNorm, a residual sum, functional pooling, a Linear; ReLUs in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        x = x + F.leaky_relu(self.second(x), 0.1)
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


def build(module, seed=0):
    torch.manual_seed(seed)
    module = module().double()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
            layer.weight.data.uniform_(-1.5, 1.5)
    return module


def lift(model):
    """Make all logits positive, so that none is left out."""
    [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].bias.data.add_(20.0)
    return model


def batch(*shape, classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (shape[0],), generator=generator)
