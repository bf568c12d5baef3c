"""Peak memory of reading, measured by the kernel in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_xai_compress.formats.packed import pack
from lightning_xai_compress.plan import CompressionPlan, Mask

from packed_nets import quantize

SCRIPT = """
import json, sys
import torch
from lightning_xai_compress import load_compressed

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

torch.set_num_threads(1)
load_compressed(sys.argv[2])  # whatever is imported late is imported now
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
state = load_compressed(sys.argv[1])
tensors = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
print(json.dumps([status("VmHWM") - before, tensors]))
"""


def convolutions():
    """Of resnet18, in size and in how it is cut: 11 million weights, the largest tensor a fifth of them."""
    layers = [nn.Conv2d(512, 512, 3, bias=False) for _ in range(3)]
    layers += [nn.Conv2d(256, 256, 3, bias=False) for _ in range(6)] + [nn.Linear(512, 1000)]
    return nn.Sequential(*layers)


def one_embedding():
    return nn.Embedding(40000, 250)


def coded(model, widths):
    return quantize(model, [name for name, p in model.named_parameters() if p.dim() > 1], sparsity=0.5, widths=widths)


def raw(model):
    return CompressionPlan(Mask({}))


def pruned(model):
    keep = {name: torch.rand(p.shape) < 0.95 for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(keep[name])
    return CompressionPlan(Mask(keep))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell the peak")
@pytest.mark.parametrize(
    ("net", "plan"),
    [
        pytest.param(convolutions, lambda model: coded(model, (2, 4, 8)), id="mixed"),
        pytest.param(convolutions, lambda model: coded(model, (8,)), id="8 bits", marks=pytest.mark.slow),
        pytest.param(convolutions, raw, id="raw", marks=pytest.mark.slow),
        pytest.param(convolutions, pruned, id="pruned", marks=pytest.mark.slow),
        pytest.param(one_embedding, lambda model: coded(model, (8,)), id="8 bits in one tensor"),
        pytest.param(one_embedding, raw, id="raw in one tensor", marks=pytest.mark.slow),
        pytest.param(one_embedding, pruned, id="pruned in one tensor", marks=pytest.mark.slow),
    ],
)
def test_reading_takes_less_than_twice_the_memory_of_the_tensors(tmp_path, net, plan):
    model = net()
    (tmp_path / "small").write_bytes(pack(nn.Linear(2, 2), CompressionPlan(Mask({}))))
    (tmp_path / "large").write_bytes(pack(model, plan(model)))

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "large"), str(tmp_path / "small")], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    peak, tensors = json.loads(done.stdout)
    assert tensors == sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    assert tensors < peak < 1.9 * tensors
