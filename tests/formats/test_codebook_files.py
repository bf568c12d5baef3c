"""Codebooks in every format: the very values back, refused where bytes lie, and read by others."""

import json
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import container
from lightning_xai_compress.formats.onnx import check_onnx, read_onnx, write_onnx
from lightning_xai_compress.formats.packed import load_compressed, pack, packed_size, read_packed
from lightning_xai_compress.formats.pt2 import check_pt2, read_pt2, write_pt2
from lightning_xai_compress.formats.pt2_planes import PackedWeight, read_weight
from lightning_xai_compress.formats.registry import Inputs
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask
from lightning_xai_compress.quantization import fit_codebook, quantize

from packed_nets import assert_same, reseal, seal
from packed_reader import read


def cnn(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)
    ).to(dtype)
    net[1].weight.data.uniform_(0.5, 1.5)
    net[1].running_var.uniform_(0.5, 1.5)
    return net.eval()


def shared(model, widths=(4, 2, 8), blocks=(1, 1, 1)):
    """Prune half, give each layer codebooks of the next width, and write their values into the model."""
    bits, scales, codebooks, sizes, keep = {}, {}, {}, {}, {}
    layers = [(name, weight) for name, weight in model.named_parameters() if weight.dim() > 1]
    for at, (name, weight) in enumerate(layers):
        width = widths[at % len(widths)]
        keep[name] = torch.rand_like(weight.float()) > 0.5
        values = (weight.detach() * keep[name]).float()
        codebooks[name] = fit_codebook(values, width, blocks=blocks[at % len(blocks)])
        bits[name] = torch.full((len(weight),), width, dtype=torch.uint8)
        scales[name], sizes[name] = torch.ones(len(weight)), weight[0].numel()
        with torch.no_grad():
            weight.copy_(quantize(values, bits[name], scales[name], codebooks[name]))
    return CompressionPlan(Mask(keep), BitAllocation(bits, sizes), scales, codebooks=codebooks)


def version(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["version"]


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))


each_blocks = pytest.mark.parametrize("blocks", [(1, 1, 1), (4, 2, 5)], ids=["layer", "blocks"])


@each_blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_packed_file_gives_the_values_back(tmp_path, dtype, blocks):
    model = cnn(dtype)
    plan = shared(model, blocks=blocks)
    data = pack(model, plan)
    (tmp_path / "m").write_bytes(data)

    assert_same(load_compressed(tmp_path / "m"), model)
    assert_same(load_compressed(tmp_path / "m", cnn(dtype)).state_dict(), model)

    assert version(data) == "3"
    found = {entry.name: entry.bits for entry in read_packed(tmp_path / "m").tensors}
    assert found["0.weight"] == {4: 8}
    assert found["6.weight"] == {8: 5}
    size = packed_size(model, plan)
    assert size.total == len(data) == size.payload + size.scales + size.rest + size.metadata


@each_blocks
def test_a_reader_written_from_the_documentation_agrees(blocks):
    model = cnn()
    tensors, index = read(pack(model, shared(model, blocks=blocks)))

    for name, tensor in model.state_dict().items():
        dtype, shape, content = tensors[name]
        assert (f"torch.{dtype}", shape) == (str(tensor.dtype), tuple(tensor.shape))
        assert content == (tensor + 0.0 if tensor.is_floating_point() else tensor).contiguous().numpy().tobytes(), name
    held = [row[4] for row in index["tensors"] if len(row) == 5 and row[3] == 1]
    assert [1 if isinstance(each, str) else len(each) for each in held] == [*blocks]


@pytest.mark.parametrize(
    "forged", [[], ["3f80bf80"], ["3f80bf80"] * 4, ["3f80bf80", "3f804000c000bf80"], ["3f80bf80", 1]]
)
def test_codebooks_that_do_not_fit_the_channels_are_refused(tmp_path, forged):
    model = cnn()
    data = pack(model, shared(model, blocks=(1, 2, 1)))

    def change(index):
        row = next(row for row in index["tensors"] if row[0] == "3.weight")
        assert [len(each) for each in row[4]] == [8, 8]
        row[4] = forged

    (tmp_path / "m").write_bytes(reseal(data, change))

    with pytest.raises(ArtifactError, match="is damaged"):
        load_compressed(tmp_path / "m")


def test_integers_are_not_made_of_codebooks(tmp_path):
    model = cnn()
    (tmp_path / "m").write_bytes(pack(model, shared(model)))

    loaded = load_compressed(tmp_path / "m", cnn(), integers=True)

    assert type(loaded[6].weight) is nn.Parameter
    assert torch.equal(loaded[6].weight, model[6].weight)


def test_an_older_reader_refuses_it_by_its_version(tmp_path, monkeypatch):
    model = cnn()
    (tmp_path / "m").write_bytes(pack(model, shared(model)))
    monkeypatch.setattr(container, "VERSIONS", (1, 2))

    with pytest.raises(ArtifactError, match="was written by version 3 of the format, this package reads 1, 2: install"):
        load_compressed(tmp_path / "m")


@pytest.mark.parametrize(
    "forged",
    [
        "", "3f80", "3f803f8", "3f803f803f80", "3f80bf80" * 200, "zzzzbf80", "7f80bf80", "bf803f80", 7.0, None, [1],
        "-f80bf80",
    ],
)  # fmt: skip
def test_a_codebook_that_is_none_is_refused(tmp_path, forged):
    model = cnn()
    data = pack(model, shared(model))

    def change(index):
        row = next(row for row in index["tensors"] if row[0] == "3.weight")
        assert len(row[4]) == 8  # two values beside zero
        row[4] = forged

    (tmp_path / "m").write_bytes(reseal(data, change))

    with pytest.raises(ArtifactError, match="is damaged"):
        load_compressed(tmp_path / "m")


def test_codes_beyond_a_codebook_are_refused(tmp_path):
    model = cnn()
    data = pack(model, shared(model))

    def change(index):
        next(row for row in index["tensors"] if row[0] == "0.weight")[4] = "3f80bf80"

    (tmp_path / "m").write_bytes(reseal(data, change))

    with pytest.raises(ArtifactError, match=r"is damaged: .*0\.weight has codes beyond its codebook of 3 values"):
        load_compressed(tmp_path / "m")


def planes(blocks):
    """Buffers of a weight of two bits as a pt2 file has them, and how many rows of which width it has."""
    weight = torch.tensor([[-1.0, 0.0, 2.0], [2.0, 2.0, -1.0]])
    codebook = torch.tensor([[-1.0, 0.0, 2.0]] * blocks)
    packed = PackedWeight("w", weight, torch.ones(2), torch.full((2,), 2, dtype=torch.uint8), codebook)
    return weight, {name: each.flatten().view(torch.uint8).numpy() for name, each in packed.named_buffers()}


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(
    ("name", "forged", "text"),
    [
        ("int2_plane2", [0xFF, 0xFF], "codes beyond a codebook of 3 values"),
        ("codebook", [0x80, 0xBF, 0, 0], "codebooks of 2 values in all for 2 rows"),
        ("codebook", [0] * 18, "codebooks of 9 values in all for 2 rows"),
    ],
)
def test_codebooks_of_a_pt2_file_that_do_not_fit_are_refused(blocks, name, forged, text):
    weight, buffers = planes(blocks)
    assert torch.equal(read_weight(buffers, [(2, 2)], [2, 3], torch.float32), weight)

    with pytest.raises(ValueError, match=text):
        read_weight(buffers | {name: np.array(forged, np.uint8)}, [(2, 2)], [2, 3], torch.float32)


def test_groups_beside_a_codebook_are_refused(tmp_path):
    model = cnn()
    data = pack(model, shared(model))

    def change(index):
        next(row for row in index["tensors"] if row[0] == "3.weight").append(2)

    (tmp_path / "m").write_bytes(reseal(data, change))

    with pytest.raises(ArtifactError, match=r"is damaged: .*3\.weight has more beside its codebooks: \(2,\)"):
        load_compressed(tmp_path / "m")


def test_a_codebook_in_an_older_file_is_refused(tmp_path):
    model = cnn()
    data = pack(model, shared(model))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["version"] = "2"
    (tmp_path / "m").write_bytes(seal(header, data[8 + length :]))

    with pytest.raises(ArtifactError, match="is damaged"):
        load_compressed(tmp_path / "m")


@pytest.mark.parametrize(
    "write",
    [
        lambda model, plan, path: pack(model, plan),
        lambda m, p, path: write_pt2(m, p, path, [Inputs((X,))]),
        lambda m, p, path: write_onnx(m, p, path, [Inputs((X,))]),
    ],
    ids=["packed", "pt2", "onnx"],
)
def test_weights_off_their_codebook_are_refused(tmp_path, write):
    model = cnn()
    plan = shared(model)
    with torch.no_grad():
        model[6].weight[model[6].weight != 0] += 0.001

    with pytest.raises(ArtifactError, match=r"6\.weight does not lie on its codebook: \d+ of 120 weights"):
        write(model, plan, tmp_path / "m")


@each_blocks
@pytest.mark.parametrize("folded", [True, False])
def test_onnxruntime_gathers_them(tmp_path, folded, blocks):
    model = cnn()
    plan = shared(model, widths=(4, 2, 8) if folded else (3, 6, 4), blocks=blocks)
    path = tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_onnx(model, plan, path, [Inputs((X,)), Inputs((X[:1],))])

    assert check_onnx(path, model, [Inputs((X,))]) < 1e-5

    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    np.testing.assert_allclose(found, model(X).detach().numpy(), rtol=1e-4, atol=1e-5)
    stored = {entry.name: entry for entry in read_onnx(path).tensors}
    assert torch.equal(stored["6.weight"].values, model[6].weight)
    assert stored["6.weight"].bits == ({8: 5} if folded else {4: 5})
    assert stored["3.weight"].bits == ({2: 6} if folded else {8: 6})


def test_torch_export_looks_them_up(tmp_path):
    model = cnn()
    plan = shared(model)
    path = tmp_path / "m.pt2"
    write_pt2(model, plan, path, [Inputs((X,)), Inputs((X[:1],))])

    assert check_pt2(path, model, [Inputs((X,))]) == 0.0

    program = torch.export.load(str(path)).module()
    torch.testing.assert_close(program(X), model(X), rtol=1e-6, atol=1e-6)
    stored = {entry.name: entry for entry in read_pt2(path).tensors}
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name].values, tensor), name
    assert stored["0.weight"].bits == {4: 8}
