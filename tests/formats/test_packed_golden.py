"""Versions 1 to 3 are frozen: a file that was written once is read for ever, and an independent reader agrees."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_xai_compress.formats import packed
from lightning_xai_compress.formats.packed import load_compressed, pack
from lightning_xai_compress.plan import CompressionPlan, Mask

from packed_golden import VERSIONS, golden, golden_grouped, golden_shared
from packed_nets import assert_same, compressed, quantize
from packed_reader import read

GOLDEN = Path(__file__).parent / "golden" / "v1.safetensors"
GROUPED, SHARED = GOLDEN.with_name("v2.safetensors"), GOLDEN.with_name("v3.safetensors")
SHA256 = {
    GOLDEN: "3efa4eb62d101e3b702f632a6eb8882eccd95235ea048faac3ee32644dd8717c",
    GROUPED: "e54868874f7611f1c6562a261aa490f952deb7e569d530dc4d953f51c06b478f",
    SHARED: "41cb9debd443d4cff76a9f76395dfff527f8cbadf4b599d10170d590b2c71bd4",
}
MAKE = {GOLDEN: golden, GROUPED: golden_grouped, SHARED: golden_shared}
each_version = pytest.mark.parametrize("path", [*MAKE], ids=lambda path: path.stem)
ZLIB = "1.2.13"  # that deflated it


def as_tensors(data):
    """What the independent reader makes of a file."""
    return {
        name: torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(getattr(torch, dtype)).view(shape)
        if content
        else torch.empty(shape, dtype=getattr(torch, dtype))
        for name, (dtype, shape, content) in read(data)[0].items()
    }


def bits(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8).tolist()


def assert_same_bits(state, expected):
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert state[name].shape == tensor.shape, name
        assert bits(state[name]) == bits(tensor), name


def unfolded(data):
    """The parts of a file with all that zlib deflated unfolded."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    places = {name: header[name]["data_offsets"] for name in ("stream", "rest", "index")}
    parts = {name: data[start + first : start + end] for name, (first, end) in places.items()}
    index = json.loads(zlib.decompress(parts["index"]))
    lengths = index.pop("planes")
    return parts["stream"], index, [length > 0 for length in lengths]


@each_version
def test_the_golden_file_is_the_one_that_was_frozen(path):
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[path]


@each_version
def test_the_golden_file_is_read(path):
    model = MAKE[path]()[0]

    assert_same_bits(load_compressed(path), positive_zeros(model))


def positive_zeros(model):
    """The state dict as a file gives it back: zeros of quantized and pruned tensors are positive."""
    names = {"tied", "rows", *(name for name in model.state_dict() if "weight" in name or "pruned" in name)}
    return {name: tensor + 0.0 if name in names else tensor for name, tensor in model.state_dict().items()}


def test_the_golden_file_holds_every_kind_of_tensor():
    index = read(GOLDEN.read_bytes())[1]

    rows = [tuple(row[1:2] + row[3:]) for row in index["tensors"] if len(row) > 2]
    assert {(dtype, 1) for dtype in ("float32", "float64", "float16", "bfloat16")} <= set(rows)
    assert {("float32", 2), ("float32", 2, "float16"), ("bfloat16", 2)} <= set(rows)
    assert {("float32", 0), ("float32", 0, "float16"), ("int64", 0), ("bool", 0), ("bfloat16", 0)} <= set(rows)
    assert ["conv.weight", 0] in index["tensors"]
    assert {width for width, _ in index["contexts"]} == {1, 2, 3, 4, 5, 6, 7, 8}
    assert index["provenance"] == {"criterion": "lrp", "note": "größe"}
    assert index["versions"] == VERSIONS


def test_the_golden_file_of_version_2_has_groups_beside_rows():
    data = GROUPED.read_bytes()

    assert version(data) == "2"
    assert {width for width, _ in read(data)[1]["contexts"]} == {2, 3, 4, 5, 6, 8}


def test_the_golden_file_of_version_3_has_codebooks_beside_groups_and_rows():
    data = SHARED.read_bytes()

    assert version(data) == "3"
    last = [row[4] for row in read(data)[1]["tensors"] if len(row) > 4]
    assert [len(entry) for entry in last if isinstance(entry, str)] == [4 * (2**width - 2) for width in (4, 8)]
    assert [entry for entry in last if isinstance(entry, int)] == [2, 4]
    assert [entry for entry in last if isinstance(entry, list)] == [["3c80bc80", "3d00bd00", "3d80bd80"]]


def version(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["version"]


@each_version
def test_a_reader_written_from_the_documentation_agrees(path):
    assert_same_bits(load_compressed(path), as_tensors(path.read_bytes()))


def several(model):
    generator = torch.Generator().manual_seed(0)
    model.register_buffer("long", torch.randn(1_200_000, generator=generator))
    model.register_buffer("long_half", torch.randn(2_200_000, generator=generator).half().float())
    return model, CompressionPlan(Mask({}))


def tied():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    model[1].weight = model[0].weight
    return model, quantize(model, ["1.weight"])


@pytest.mark.parametrize(
    "make", [compressed, tied, lambda: compressed(classes=300), lambda: several(nn.Module())], ids=range(4)
)
def test_a_reader_written_from_the_documentation_agrees_on_other_files(tmp_path, make):
    data = pack(*make())
    (tmp_path / "m").write_bytes(data)

    assert_same_bits(load_compressed(tmp_path / "m"), as_tensors(data))


@each_version
def test_writing_the_golden_model_gives_the_same_content(monkeypatch, path):
    """Not the same bytes on every machine: another zlib deflates to other bytes, and so to other digests."""
    monkeypatch.setattr(packed, "_versions", lambda: VERSIONS)
    data = pack(*MAKE[path]())

    assert unfolded(data) == unfolded(path.read_bytes())
    assert_same_bits(as_tensors(data), as_tensors(path.read_bytes()))
    assert abs(len(data) - path.stat().st_size) < 64


@each_version
@pytest.mark.skipif(zlib.ZLIB_RUNTIME_VERSION != ZLIB, reason="another zlib may deflate to other bytes")
def test_writing_the_golden_model_gives_the_same_bytes(monkeypatch, path):
    monkeypatch.setattr(packed, "_versions", lambda: VERSIONS)

    assert pack(*MAKE[path]()) == path.read_bytes()


def test_the_golden_file_fills_its_model():
    model, _ = golden()
    fresh, _ = golden()
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.zero_()

    assert load_compressed(GOLDEN, fresh) is fresh
    assert_same(fresh.state_dict(), model)
    assert fresh.tied is fresh.conv.weight
