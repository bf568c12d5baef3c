"""Version 2 of the packed format: groups of input channels with a width and a scale each."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import container
from lightning_xai_compress.formats.packed import load_compressed, pack, packed_size, read_packed

from grouped_nets import NETWORKS, mlp, on_groups
from packed_nets import assert_same, reseal, seal
from packed_reader import read


def version(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["version"]


def with_version(data, number):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["version"] = number
    return seal(header, data[8 + length :])


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize("network", NETWORKS)
def test_groups_come_back_exactly(tmp_path, network, sparsity):
    model = NETWORKS[network][0]()
    plan = on_groups(model, sparsity=sparsity)
    data = pack(model, plan)
    (tmp_path / "m").write_bytes(data)

    assert_same(load_compressed(tmp_path / "m"), model)

    assert version(data) == "2"
    assert_same(load_compressed(tmp_path / "m", NETWORKS[network][0]()).state_dict(), model)
    found = {tensor.name: tensor.bits for tensor in read_packed(tmp_path / "m").tensors}
    for name, bits in plan.allocation.bits.items():
        assert found[name] == {width: bits.tolist().count(width) for width in sorted(set(bits.tolist()))}
    size = packed_size(model, plan)
    assert size.total == len(data) == size.payload + size.scales + size.rest + size.metadata


@pytest.mark.parametrize("network", ["cnn", "channels_last", "mlp", "float16"])
def test_a_reader_written_from_the_documentation_agrees(network):
    model = NETWORKS[network][0]()
    plan = on_groups(model, sparsity=0.5)

    tensors, index = read(pack(model, plan))

    for name, tensor in model.state_dict().items():
        dtype, shape, content = tensors[name]
        assert (f"torch.{dtype}", shape) == (str(tensor.dtype), tuple(tensor.shape))
        assert content == (tensor + 0.0 if tensor.is_floating_point() else tensor).contiguous().numpy().tobytes(), name
    counts = {row[0]: row[4] for row in index["tensors"] if len(row) == 5 and row[3] == 1}
    expected = {name: len(bits) // len(model.get_parameter(name)) for name, bits in plan.allocation.bits.items()}
    assert counts == {name: count for name, count in expected.items() if count > 1}


def test_without_groups_a_file_is_of_version_1():
    model = mlp()
    data = pack(model, on_groups(model, groups=(1,)))

    assert version(data) == "1"
    assert all(len(row) == 4 for row in read(data)[1]["tensors"] if row[3] == 1)


def test_a_reader_of_version_1_alone_refuses_groups_by_the_version(tmp_path, monkeypatch):
    model = mlp()
    (tmp_path / "m").write_bytes(pack(model, on_groups(model)))
    monkeypatch.setattr(container, "VERSIONS", (1,))

    with pytest.raises(ArtifactError, match=r"was written by version 2 of the format, this package reads 1: install"):
        load_compressed(tmp_path / "m")


@pytest.mark.parametrize("forged", [0, 1, -1, -4, 5, 8, 24, 1 << 70, 2.0, "4", None, True, [4]])
def test_a_number_of_groups_that_cannot_be_is_refused(tmp_path, forged):
    model = mlp()
    data = pack(model, on_groups(model))  # 0.weight: 9 channels of 12 inputs in 4 groups

    def change(index):
        assert index["tensors"][0][4] == 4
        index["tensors"][0][4] = forged

    (tmp_path / "m").write_bytes(reseal(data, change))

    with pytest.raises(ArtifactError, match=r"is damaged: .*0\.weight of shape \[9, 12\] cannot have .* groups of inp"):
        load_compressed(tmp_path / "m")


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.append("float16"),
        lambda row: row.append(4),
        lambda row: row.__setitem__(3, 0),
        lambda row: row.__setitem__(3, 2),
        lambda row: row.__setitem__(2, [108]),
        lambda row: row.pop(),
    ],
    ids=["float16", "twice", "raw", "bitmap", "one dimension", "none"],
)
def test_groups_of_what_has_none_are_refused(tmp_path, change):
    model = mlp()
    data = pack(model, on_groups(model))
    (tmp_path / "m").write_bytes(reseal(data, lambda index: change(index["tensors"][0])))

    with pytest.raises(ArtifactError, match="is damaged"):
        load_compressed(tmp_path / "m")


def test_groups_in_a_file_of_version_1_are_refused(tmp_path):
    model = mlp()
    (tmp_path / "m").write_bytes(with_version(pack(model, on_groups(model)), "1"))

    with pytest.raises(ArtifactError, match=r"is damaged: .*0\.weight of float32 and kind 1 cannot be held as \(4,\)"):
        load_compressed(tmp_path / "m")


def test_rows_without_number_are_refused_before_time_is_taken(tmp_path):
    model = mlp()

    def change(index):
        index["tensors"][0][2:] = [[9, 1 << 16], 1, 1 << 15]

    (tmp_path / "m").write_bytes(reseal(pack(model, on_groups(model)), change))

    with pytest.raises(ArtifactError, match="declares 294924 rows of coded tensors: expected at most 65536"):
        load_compressed(tmp_path / "m")


def test_damage_anywhere_is_refused(tmp_path):
    model = mlp()
    data = pack(model, on_groups(model))
    rng = np.random.default_rng(0)

    for position in rng.integers(0, len(data), 200):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        (tmp_path / "m").write_bytes(damaged)
        with pytest.raises(ArtifactError):
            load_compressed(tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_weights_become_integers_with_a_scale_a_group(tmp_path, dtype):
    model = mlp().to(dtype)
    (tmp_path / "m").write_bytes(pack(model, on_groups(model, sparsity=0.3)))

    fresh = load_compressed(tmp_path / "m", mlp().to(dtype), integers=True)

    for layer, groups in ((0, 4), (2, 3)):
        weight = fresh[layer].weight
        assert isinstance(weight, IntxUnpackedToInt8Tensor)
        assert weight.block_size == (1, model[layer].in_features // groups)
        assert torch.equal(weight.dequantize(), model[layer].weight)
    x = torch.randn(5, 12, dtype=dtype)
    assert torch.equal(fresh(x), model(x))


def test_a_weight_off_the_grid_of_its_group_is_named_with_it():
    model = nn.Linear(12, 3)
    plan = on_groups(model)
    with torch.no_grad():
        model.weight[1, 7] += 0.3 * plan.scales["weight"][6]

    with pytest.raises(ArtifactError, match=r"weight does not lie on its grid: 1 of 36 .* channel 1, group 2 \(scale"):
        pack(model, plan)


def test_rows_that_do_not_divide_the_inputs_are_refused():
    model = nn.Linear(12, 3)
    plan = on_groups(model)

    with pytest.raises(ArtifactError, match=r"weight has 3 output channels, but \(12,\) scales .*cannot be cut into"):
        pack(nn.Linear(9, 3), plan.__class__(plan.mask.__class__({}), plan.allocation, plan.scales))
