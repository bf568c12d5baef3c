"""Small models whose weights lie on a grid for each group of input channels, and plans that say so."""

import random

import torch
from torch import nn

from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask

from traced_nets import cnn

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def on_groups(model, *, groups=(4, 3, 2, 1), widths=WIDTHS, sparsity=0.0):
    """Prune and quantize all weights, group by group; each weight takes the first number of groups that divides it."""
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    keep, bits, scales, sizes = {}, {}, {}, {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        count = next(each for each in groups if weight.shape[1] % each == 0)
        size = weight.shape[1] // count
        keep[name] = torch.rand(weight.shape, generator=generator) >= sparsity
        values = (weight.detach() * keep[name]).float()
        rows = []
        for channel in range(len(weight)):
            for group in range(count):
                part = values[channel, group * size : (group + 1) * size]
                width = draw.choice(widths)
                limit = 2 ** (width - 1) - 1
                step = (part.abs().max() / limit * 1.01).bfloat16().float()
                part.copy_((part / step).round().clamp(-limit, limit) * step + 0.0 if step else torch.zeros(()))
                rows.append((width, float(step)))
        with torch.no_grad():
            weight.copy_(values)
        bits[name] = torch.tensor([width for width, _ in rows], dtype=torch.uint8)
        scales[name] = torch.tensor([step for _, step in rows])
        sizes[name] = values.numel() // len(rows)
    return CompressionPlan(Mask(keep), BitAllocation(bits, sizes), scales)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 4))


def transposed():
    torch.manual_seed(0)
    return nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2))


def channels_last():
    model = cnn().to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    return model


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, tokens):
        return self.fc(self.embed(tokens))


NETWORKS = {
    "cnn": (cnn, (torch.randn(3, 3, 8, 8),)),
    "channels_last": (channels_last, (torch.randn(3, 3, 8, 8),)),
    "mlp": (mlp, (torch.randn(3, 12),)),
    "tokens": (mlp, (torch.randn(3, 5, 12),)),
    "transposed": (transposed, (torch.randn(3, 4, 5, 5),)),
    "embedding": (Embedded, (torch.randint(0, 11, (3, 5)),)),
    "float16": (lambda: mlp().half(), (torch.randn(3, 12).half(),)),
}
