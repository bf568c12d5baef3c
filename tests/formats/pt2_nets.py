"""Small models and plans of them, and forged files, for tests of the format pt2."""

import hashlib
import io
import random
import zipfile

import torch
from torch import nn

from lightning_xai_compress.formats.pt2 import check_pt2, write_pt2
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask

from traced_nets import Reused, cnn

CONFIG = "data/weights/model_weights_config.json"
EXTRA = "extra/lightning_xai_compress.json"
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def quantize(model, widths=WIDTHS, float_layers=(), **facts):
    """Put weights of two and more dimensions onto a symmetric grid per row, and say so in a plan."""
    draw = random.Random(0)
    keep, bits, scales, sizes = {}, {}, {}, {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or name in float_layers:
            continue
        bits[name] = torch.tensor([draw.choice(widths) for _ in range(len(weight))], dtype=torch.uint8)
        limit = 2.0 ** (bits[name].float() - 1) - 1
        peak = weight.detach().float().flatten(1).abs().amax(1)
        scales[name] = (peak / limit * 1.01).bfloat16().float()
        step = scales[name].reshape(-1, *[1] * (weight.dim() - 1))
        limit = limit.reshape(step.shape)
        with torch.no_grad():
            codes = torch.where(step > 0, weight / step, 0.0).round().clamp(-limit, limit)
            weight.copy_(codes * step + 0.0)
        keep[name] = torch.ones_like(weight, dtype=torch.bool)
        sizes[name] = weight[0].numel()
    return CompressionPlan(Mask(keep), BitAllocation(bits, sizes), scales, **facts)


def export(model, plan, path, *examples):
    write_pt2(model, plan, path, examples)
    return check_pt2(path, model, examples)


def loaded(path):
    return torch.export.load(str(path)).module()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, query, memory):
        return self.cross(query, memory, memory)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


NETWORKS = {
    "cnn": (cnn, (torch.randn(3, 3, 8, 8),)),
    "channels_last": (lambda: cnn().to(memory_format=torch.channels_last), (torch.randn(3, 3, 8, 8),)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)), (torch.randn(3, 6),)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)), (torch.randn(3, 5, 6),)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(3, 5, 8),)),
    "attention": (Attention, (torch.randn(3, 5, 8), torch.randn(3, 4, 8))),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 7, 3), nn.ReLU(), nn.Conv1d(7, 4, 3)), (torch.randn(3, 3, 9),)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ReLU()), (torch.randn(3, 4, 5, 5),)),
    "reused": (Reused, (torch.randint(0, 11, (3, 5)),)),
    "recurrent": (Recurrent, (torch.randn(3, 5, 6),)),
    "float64": (lambda: nn.Linear(6, 9).double(), (torch.randn(3, 6).double(),)),
    "bfloat16": (lambda: nn.Linear(6, 9).bfloat16(), (torch.randn(3, 6).bfloat16(),)),
}


def forge(data, path, changes):
    """An archive with other members, and the digest that fits it."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as made:
        parts = {entry.filename: source.read(entry) for entry in source.infolist()}
        for name, change in changes.items():
            parts[f"archive/{name}"] = change(parts.get(f"archive/{name}", b""))
        for name, content in parts.items():
            made.writestr(name, content)
        made.comment = b"0" * 64
    content = target.getvalue()[:-64]
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())


def swap(old, new):
    def change(content):
        assert old in content
        return content.replace(old, new, 1)

    return change
