"""At least 10,000 damaged files, most of them with a digest that is right: refused, or read as what they declare."""

import json
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.packed import load_compressed, pack, read_packed

import packed_mutations
from packed_golden import golden
from packed_mutations import any_bytes, take_apart
from packed_nets import compressed, quantize

LONGEST = 20.0  # seconds: one that hangs is found, one on a busy machine is none
MEMORY = 400 << 20  # bytes that all of them may take at most


def tied():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3))
    model[1].weight = model[0].weight
    return model, quantize(model, ["0.weight"], widths=(4,))


FILES = [golden, compressed, tied]


def declared(data):
    """What a sealed file says that it holds: name -> dtype, shape."""
    rows = json.loads(zlib.decompress(take_apart(data)[1]["index"]))["tensors"]
    full = [rows[row[1]] if len(row) == 2 else row for row in rows]
    return {own[0]: (f"torch.{row[1]}", tuple(row[2])) for own, row in zip(rows, full, strict=True)}


def try_file(path, data, model):
    """Read a file, once in a while into a model; tell whether it was refused."""
    path.write_bytes(data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()} if model is not None else {}
    start = time.perf_counter()
    try:
        state = load_compressed(path) if model is None else load_compressed(path, model).state_dict()
    except ArtifactError as error:
        told = str(error)
        for name, tensor in before.items():
            own = model.state_dict()[name].reshape(-1).view(torch.uint8)
            assert torch.equal(own, tensor.reshape(-1).view(torch.uint8)), name
        return str(path) in told
    finally:
        assert time.perf_counter() - start < LONGEST
    assert {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()} == declared(data)
    return False


def peak(reset=False):
    """Most memory that this process took since the last reset, in bytes; 0 where the kernel does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("make", FILES)
def test_files_that_are_damaged_are_refused_by_their_digest(tmp_path, make):
    rng = np.random.default_rng(0)
    model, plan = make()
    data = pack(model, plan)

    for turn in range(1500):
        other = any_bytes(data, rng)
        assert try_file(tmp_path / "m", other, model if turn % 4 == 0 else None) == (other != data)


KINDS = {
    "sealed_header": (800, 0.5),
    "sealed_stream": (400, 0.02),
    "sealed_rest": (400, 0.02),
    "sealed_index": (900, 0.5),
    "sealed_values": (1500, 0.5),
    "sealed_swap": (200, 0.5),
}


@pytest.mark.parametrize("make", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_beneath_a_good_digest_is_refused_or_read_as_declared(tmp_path, make, kind):
    rng = np.random.default_rng(1)
    model, plan = make()
    data = pack(model, plan)
    count, least = KINDS[kind]
    refused = 0
    before = peak(reset=True)

    for turn in range(count):
        other = getattr(packed_mutations, kind)(data, rng)
        refused += try_file(tmp_path / "m", other, model if turn % 4 == 0 else None)
        if turn % 10 == 0:
            try:
                contents = read_packed(tmp_path / "m")
                assert sum(tensor.bytes for tensor in contents.tensors) < len(other)
            except ArtifactError:
                pass

    assert refused > least * count
    assert peak() - before < MEMORY


def test_there_are_at_least_10000_mutations():
    assert len(FILES) * (1500 + sum(count for count, _ in KINDS.values())) > 10_000
    assert len(FILES) * sum(count for count, _ in KINDS.values()) > 10_000
