"""A network that is trained, and functions that compare what became of it."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Where is the bright corner of a noisy 6x6 image? 8*9 + 8*8*9 + 32*16 + 16*4 = 1,224 weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.hidden = nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        x = F.relu(self.norm(self.first(x)))
        x = F.avg_pool2d(F.relu(self.second(x)), 3)
        return self.head(F.relu(self.hidden(self.drop(x.flatten(1)))))


def samples(seed, count=192):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    x = torch.randn(count, 1, 6, 6, generator=generator) * 0.6
    for index, label in enumerate(y.tolist()):
        row, column = 3 * (label // 2), 3 * (label % 2)
        x[index, 0, row : row + 3, column : column + 3] += 1.0
    return TensorDataset(x, y)


TRAINING, VALIDATION = list(DataLoader(samples(1), 32)), list(DataLoader(samples(2), 96))


@cache
def dense():
    """Trained once, not to be changed."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(8):
        for x, y in TRAINING:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.zero_grad()
    return model.eval()


def copies(model):
    return {name: each.clone() for name, each in model.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
