"""The model of the golden file, from whole-number arithmetic alone: no library's random numbers can change it."""

import numpy as np
import torch
from torch import nn

from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask, Skipped

VERSIONS = {"lightning-xai-compress": "0.1.0", "torch": "2.14.1"}


def spread(count, salt):
    """Integers in 0..9972 without much order."""
    i = np.arange(count, dtype=np.int64)
    return (i * i * 7 + i * (101 + salt) + salt * salt) % 9973


def coded(shape, widths, salt):
    """Codes of every width, many zeros among them, one row all zero; and scales that bfloat16 holds."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    bits = np.array([widths[i % len(widths)] for i in range(rows)])
    high = 2 ** (bits - 1) - 1
    noise = spread(rows * columns, salt).reshape(rows, columns)
    codes = np.where(noise % 3 == 0, 0, noise // 3 % (2 * high[:, None] + 1) - high[:, None])
    codes[rows // 2] = 0
    scales = (128 + spread(rows, salt + 1) % 128) * 2.0 ** -(7 + bits)
    return torch.from_numpy(codes), torch.from_numpy(bits), torch.from_numpy(scales)


CODED = {
    "conv.weight": ((14, 3, 3, 3), (2, 3, 4, 5, 6, 7, 8), torch.float32),
    "wide.weight": ((9, 40), (4,), torch.float64),
    "sixteen.weight": ((6, 30), (2, 8), torch.float16),
    "brain.weight": ((6, 30), (3, 8), torch.bfloat16),
}


GROUPED = {  # shape, input channels a group
    "conv.weight": ((7, 8, 3, 3), 4),
    "fc.weight": ((5, 12), 3),
}


def golden_grouped():
    """Model and plan of a file of version 2: widths and scales by groups of input channels; one layer by row."""
    model, bits, scales, sizes = nn.Module(), {}, {}, {}
    for salt, (name, (shape, group)) in enumerate(GROUPED.items()):
        groups = shape[1] // group
        codes, widths, scale = coded((shape[0] * groups, group, *shape[2:]), (2, 3, 4, 6, 8), salt)
        bits[name], scales[name], sizes[name] = widths.to(torch.uint8), scale.float(), codes.shape[1]
        part = nn.Module()
        part.weight = nn.Parameter((codes.float() * scale[:, None].float()).view(shape), requires_grad=False)
        model.add_module(name.split(".")[0], part)
    codes, widths, scale = coded((6, 10), (3, 5), 7)
    bits["rows"], scales["rows"], sizes["rows"] = widths.to(torch.uint8), scale.float(), 10
    model.register_parameter("rows", nn.Parameter(codes.float() * scale[:, None].float(), requires_grad=False))
    return model, CompressionPlan(Mask({}), BitAllocation(bits, sizes), scales)


SHARED = {  # shape, width, blocks of channels, type
    "few.weight": ((6, 4, 3), 2, 3, torch.float32),
    "some.weight": ((5, 21), 4, 1, torch.float16),
    "many.weight": ((7, 60), 8, 1, torch.float32),
}


def golden_shared():
    """Model and plan of a file of version 3: layers with codebooks beside those of version 2."""
    model, plan = golden_grouped()
    bits, sizes = dict(plan.allocation.bits), dict(plan.allocation.channel_size)
    scales, codebooks = dict(plan.scales), {}
    for salt, (name, (shape, width, blocks, dtype)) in enumerate(SHARED.items()):
        codes, widths, _ = coded(shape, (width,), salt)
        places = np.arange(1, 2 ** (width - 1))
        above, below = (places + places // 2) / 64, -(places + places // 3) / 64  # bfloat16 holds all of them
        first = torch.from_numpy(np.concatenate([below[::-1], [0.0], above])).float()
        codebooks[name] = torch.stack([first * 2.0**block for block in range(blocks)])
        bits[name], scales[name], sizes[name] = widths.to(torch.uint8), torch.ones(shape[0]), codes.shape[1]
        part = nn.Module()
        block = torch.arange(shape[0]).unsqueeze(1) * blocks // shape[0]
        values = codebooks[name][block, codes + len(places)].to(dtype).view(shape)
        part.weight = nn.Parameter(values, requires_grad=False)
        model.add_module(name.split(".")[0], part)
    return model, CompressionPlan(Mask({}), BitAllocation(bits, sizes), scales, codebooks=codebooks)


def golden():
    """The model and the plan."""
    model = nn.Module()
    bits, scales, sizes, keep = {}, {}, {}, {}
    for salt, (name, (shape, widths, dtype)) in enumerate(CODED.items()):
        codes, bits[name], scale = coded(shape, widths, salt)
        bits[name], scales[name] = bits[name].to(torch.uint8), scale.float()
        sizes[name] = codes.shape[1]
        part = nn.Module()
        part.weight = nn.Parameter((codes.float() * scale[:, None].float()).to(dtype).view(shape), requires_grad=False)
        model.add_module(name.split(".")[0], part)
    model.register_parameter("tied", model.conv.weight)
    floats = torch.from_numpy(spread(300, 9) - 5000)
    some = {"pruned": floats % 2048 / 1024, "pruned_rough": floats / 1000, "pruned_brain": (floats / 1000).bfloat16()}
    for name, values in some.items():
        keep[name] = torch.from_numpy(spread(120, 11) % 4 == 0).view(8, 15)
        model.register_parameter(name, nn.Parameter(values[:120].view(8, 15) * keep[name], requires_grad=False))
    buffers = {
        "exact": torch.from_numpy(spread(50, 3) % 2048).float() / 2048,
        "rough": (floats / 3000).float(),
        "rough_double": floats[:20].double() / 3000,
        "signed_zeros": torch.tensor([-0.0, 0.0, float("inf"), -65504.0]),
        "not_a_number": torch.tensor([float("nan"), 1.0]),
        "brain_rest": (floats[:30] / 3000).to(torch.bfloat16),
        "half_rest": (floats[:30] / 3000).to(torch.float16),
        "num_batches_tracked": torch.tensor(2**40 + 1),
        "negative": torch.tensor([-1, -(2**63), 2**62]),
        "flags": torch.tensor([[True], [False]]),
        "waves": torch.tensor([1 + 2j, -0.5j]),
        "eighths": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(0.5),
    }
    for name, value in buffers.items():
        model.register_buffer(name, value)
    plan = CompressionPlan(
        Mask(keep),
        BitAllocation(bits, sizes),
        scales,
        (Skipped("rough", "too small"),),
        {"criterion": "lrp", "note": "größe"},
    )
    return model, plan
