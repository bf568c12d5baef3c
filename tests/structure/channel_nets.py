"""Networks whose channels are coupled in one way each, with an input of each."""

import torch
import torch.nn.functional as F
from torch import nn


class Chain(nn.Module):
    """Two convolutions with BatchNorm, flattened into two Linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.second, self.slope = nn.Conv2d(16, 24, 3), nn.PReLU(24)
        self.hidden, self.head = nn.Linear(24 * 4, 32), nn.Linear(32, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = self.slope(self.second(x))
        return self.head(F.gelu(self.hidden(x.flatten(1))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 16, 3), nn.Conv2d(1, 24, 3)
        self.norm, self.join, self.head = nn.BatchNorm2d(40), nn.Conv2d(40, 16, 1), nn.Linear(16, 3)

    def forward(self, x):
        x = self.norm(torch.cat([self.left(x), self.right(x)], dim=1))
        return self.head(F.relu(self.join(F.relu(x))).mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.norm = nn.Conv2d(1, 16, 1), nn.BatchNorm2d(16)
        self.depth, self.project, self.head = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = F.hardswish(self.depth(F.relu6(self.norm(self.expand(x)))))
        return self.head(F.sigmoid(self.project(x)).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.grouped = nn.Conv2d(1, 32, 1), nn.Conv2d(32, 64, 3, groups=4)
        self.after, self.head = nn.Conv2d(64, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.relu(self.after(F.relu(self.grouped(F.relu(self.before(x)))))).mean((2, 3)))


class Tied(nn.Module):
    """One weight under two names: its inputs are its outputs, too."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.two.weight = self.one.weight
        self.free, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.two(F.relu(self.one(F.relu(self.stem(x))))))
        return self.head(F.relu(self.free(x)).mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 16, 3, stride=2), nn.ConvTranspose2d(16, 24, 2, stride=2)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24, 3)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.up(F.relu(self.down(x))))).mean((2, 3)))


class Normalized(nn.Module):
    """LayerNorm looks at the whole stream; the inner width is free."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.wide, self.narrow, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x.flatten(1)[:, :6])
        return self.head(self.norm(x + self.narrow(F.gelu(self.wide(x)))))


class Shuffled(nn.Module):
    """Channels change places between groups, which no graph of couplings follows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = x.view(len(x), 2, 8, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        x = F.relu(self.second(x))
        x = x.view(len(x), 2, 8, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(x.mean((2, 3)))


class Heads(nn.Module):
    """Attention written out: separate projections in the first layer, one for all in the second."""

    class Layer(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.num_heads, self.inner_dim = 4, 16
            if fused:
                self.qkv = nn.Linear(12, 48)
            else:
                self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 16)
            self.proj = nn.Linear(16, 12)

        def forward(self, x):
            fused = getattr(self, "qkv", None)
            parts = fused(x).chunk(3, dim=-1) if fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            q, k, v = (each.view(len(x), x.shape[1], self.num_heads, -1).transpose(1, 2) for each in parts)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), x.shape[1], self.inner_dim)
            return x + self.proj(mixed)

    def __init__(self):
        super().__init__()
        self.embed, self.one, self.two = nn.Linear(6, 12), self.Layer(False), self.Layer(True)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.norm(self.two(self.one(self.embed(x.squeeze(1))))).mean(1))


NETS = (Chain, Residual, Concat, Depthwise, Grouped, Tied, Transposed, Normalized, Heads)


def made(kind):
    """A network with BatchNorm statistics, in evaluation mode, and an input."""
    torch.manual_seed(0)
    net, x = kind(), torch.randn(4, 1, 6, 6)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(16, 1, 6, 6) + 0.5)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-1, 1)
    return net.eval(), x
