"""Small models, plans of them, and files that are damaged and sealed again, for tests of the packed format."""

import hashlib
import json
import zlib

import torch
from torch import nn

from lightning_xai_compress.formats.packed import load_compressed, pack
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask, Skipped


class Net(nn.Module):
    """A convolution, a batch norm, an embedding, a head: a bit of everything."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3)
        self.norm = nn.BatchNorm2d(24)
        self.embed = nn.Embedding(11, 5)
        self.head = nn.Linear(24, classes)


def quantize(model, names, *, sparsity=0.8, widths=(2, 3, 4, 5, 6, 7, 8), seed=0):
    """Prune and quantize weights by hand, channel by channel; return the plan."""
    generator = torch.Generator().manual_seed(seed)
    keep, bits, scales = {}, {}, {}
    for name in names:
        weight = model.get_parameter(name)
        rows = torch.randn(weight.shape, generator=generator).flatten(1)
        mask = rows.abs() > rows.abs().flatten().quantile(sparsity)
        bits[name] = torch.tensor([widths[i % len(widths)] for i in range(len(rows))], dtype=torch.uint8)
        high = (2.0 ** (bits[name] - 1) - 1)[:, None]
        scale = ((rows * mask).abs().amax(1) / high[:, 0]).to(torch.bfloat16).float()
        codes = torch.where(mask, rows / scale[:, None], 0.0).round().clamp(-high, high)
        with torch.no_grad():
            weight.copy_((codes * scale[:, None]).to(weight.dtype).view_as(weight))
        keep[name] = mask.view_as(weight)
        scales[name] = scale
    sizes = {name: model.get_parameter(name)[0].numel() for name in names}
    return CompressionPlan(Mask(keep), BitAllocation(bits, sizes), scales, (Skipped("embed", "embedding"),))


def compressed(**changes):
    torch.manual_seed(0)
    model = Net(**changes)
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.num_batches_tracked.fill_(2**40 + 1)
    return model, quantize(model, ["conv.weight", "head.weight"])


def round_trip(model, plan, path):
    path.write_bytes(pack(model, plan))
    return load_compressed(path)


def assert_same(state, model):
    own = model.state_dict()
    assert list(state) == list(own)
    for name, tensor in own.items():
        assert state[name].dtype == tensor.dtype
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, equal_nan=True)


def reseal(data, change):
    """Change the index of a packed file and give it a valid digest: damage that no checksum finds."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    start, end = header["index"]["data_offsets"]
    index = json.loads(zlib.decompress(body[start:end]))
    index = change(index) or index
    packed_index = zlib.compress(json.dumps(index).encode())
    header["index"]["data_offsets"] = [start, start + len(packed_index)]
    header["index"]["shape"] = [len(packed_index)]
    return seal(header, body[:start] + packed_index)


def seal(header, body):
    header["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + body
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)
