import hashlib
import json
import pickle
import zlib

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.container import open_container, write_container, write_json
from lightning_xai_compress.formats.entropy import Block, encode
from lightning_xai_compress.formats.packed import load_compressed, pack, read_packed
from lightning_xai_compress.plan import CompressionPlan, Mask

from packed_nets import Net, assert_same, compressed, reseal, seal


def test_damage_anywhere_is_refused_and_the_model_untouched(tmp_path):
    model, plan = compressed()
    data = pack(model, plan)
    path = tmp_path / "m"
    rng = np.random.default_rng(0)
    positions = np.concatenate([np.arange(96), rng.integers(0, len(data), 400), len(data) - 1 - np.arange(16)])
    torch.manual_seed(1)
    target = Net()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}

    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            load_compressed(path, target)

    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name])
    path.write_bytes(data)
    assert_same(load_compressed(path, target).state_dict(), model)


def test_files_cut_short_or_too_long_are_refused(tmp_path):
    data = pack(*compressed())
    cuts = [*range(16), *range(16, len(data), 61), len(data) - 1]

    for cut in cuts:
        (tmp_path / "m").write_bytes(data[:cut])
        with pytest.raises(ArtifactError, match=r"cut short|damaged"):
            load_compressed(tmp_path / "m")
    (tmp_path / "m").write_bytes(data + b"\0")
    with pytest.raises(ArtifactError, match=rf"damaged or cut short: expected {len(data)} bytes, got {len(data) + 1}"):
        load_compressed(tmp_path / "m")


def test_another_version_is_refused_by_number(tmp_path):
    data = pack(*compressed()).replace(b'"version":"1"', b'"version":"7"', 1)
    (tmp_path / "m").write_bytes(data)

    with pytest.raises(ArtifactError, match=r"written by version 7 of the format, this package reads 1, 2, 3: install"):
        load_compressed(tmp_path / "m")


def test_a_plain_safetensors_file_is_refused(tmp_path):
    safetensors.torch.save_file({"weight": torch.ones(3)}, tmp_path / "m")

    with pytest.raises(ArtifactError, match=r"not a packed file: expected format .* got none; .*load_file"):
        load_compressed(tmp_path / "m")


def test_a_missing_file_is_simply_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "m")


def _set(key, value):
    return lambda index: index.__setitem__(key, value)


def _tensor(position, field, value):
    return lambda index: index["tensors"][position].__setitem__(field, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: [1, 2],
        lambda index: index.pop("tensors"),
        lambda index: index.pop("planes"),
        lambda index: index.pop("contexts"),
        _set("tensors", 5),
        _set("tensors", [["a"]]),
        _set("planes", [-1] * 12),
        _set("planes", []),
        _set("planes", 7),
        _set("planes", [True] * 40),
        _set("planes", [0] * 40),
        _set("contexts", [[99, 0]]),
        _set("contexts", [["2", "0"]]),
        _set("contexts", [[2, 0, 0]]),
        _set("contexts", [[2, 9]]),
        _set("contexts", []),
        _set("contexts", [[1, 0]] * 500),
        _set("scales", [0, 1 << 40]),
        _set("scales", [0, 0]),
        _set("scales", [1 << 70, 1]),
        _set("scales", [0, True]),
        _set("scales", ["a", "b"]),
        _tensor(1, 0, "conv.weight"),
        _tensor(1, 0, 7),
        _tensor(1, 1, "float128"),
        _tensor(1, 1, "load"),
        _tensor(0, 1, "int64"),
        _tensor(1, 2, [25]),
        _tensor(1, 2, [-24]),
        _tensor(1, 2, [True]),
        _tensor(1, 2, [24.0]),
        _tensor(1, 2, "24"),
        _tensor(1, 2, [1] * 65),
        _tensor(1, 2, [0, 1 << 63]),
        _tensor(1, 3, 3),
        _tensor(1, 3, True),
        _tensor(1, 3, 2),
        _tensor(0, 3, 2),
        lambda index: index["tensors"][0].append("float16"),
        lambda index: index["tensors"][6].append("float16"),
        lambda index: index["tensors"][1].append("float32"),
        lambda index: index["tensors"][1].append(None),
        _tensor(0, 3, 0),
        _tensor(0, 2, []),
        _tensor(0, 2, [0, 3]),
        lambda index: index["tensors"].append(["tied", 999]),
        lambda index: index["tensors"].append(["tied", "conv.weight"]),
        lambda index: index["tensors"].pop(),
        lambda index: index["tensors"].pop(0),
        lambda index: index["tensors"].append(["more", "float32", [1], 0]),
    ],
)
def test_an_index_that_contradicts_the_rest_is_refused(tmp_path, change):
    (tmp_path / "m").write_bytes(reseal(pack(*compressed()), change))

    with pytest.raises(ArtifactError, match=r"is damaged: expected an index and a stream that agree, got .*; copy it"):
        load_compressed(tmp_path / "m")


def test_an_index_that_says_the_same_in_other_bytes_is_read(tmp_path):
    model, plan = compressed()
    (tmp_path / "m").write_bytes(reseal(pack(model, plan), lambda index: None))

    assert_same(load_compressed(tmp_path / "m"), model)


@pytest.mark.parametrize(
    "shape", [[1 << 40], [1 << 20, 1 << 20, 1 << 20, 1 << 20], [(1 << 63) - 1] * 64, [24, 1 << 20]]
)
def test_huge_declared_sizes_are_refused_before_memory_is_taken(tmp_path, shape):
    data = reseal(pack(*compressed()), _tensor(0, 2, shape))
    (tmp_path / "m").write_bytes(data)

    with pytest.raises(ArtifactError, match=r"declares .* bytes of tensors: expected at most 67108864"):
        load_compressed(tmp_path / "m")


def test_an_index_that_unfolds_without_end_is_refused(tmp_path):
    data = pack(*compressed())
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    start = header["index"]["data_offsets"][0]
    bomb = zlib.compress(b" " * (1 << 25), 9)
    header["index"] = {"dtype": "U8", "shape": [len(bomb)], "data_offsets": [start, start + len(bomb)]}
    (tmp_path / "m").write_bytes(seal(header, body[:start] + bomb))

    with pytest.raises(ArtifactError, match=f"expected at most {64 * len(bomb)} bytes in a zlib stream, got others"):
        load_compressed(tmp_path / "m")


def test_a_sealed_file_with_other_tensors_is_refused(tmp_path):
    header = {
        "__metadata__": {"format": "lightning-xai-compress", "version": "1"},
        "stream": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    (tmp_path / "m").write_bytes(seal(header, b"\0"))

    with pytest.raises(ArtifactError, match=r"expected the tensors \['index', 'rest', 'stream'\], got \['stream'\]"):
        load_compressed(tmp_path / "m")


NAMES = [
    *("", ".", "..", "../x", "/etc/x", "a/b", "a\\b", "C:\\x", "conv.weight\0", "a\nb", "\x7f", "\x85"),
    *("a..b", ".a", "a.", "\ud800", "x" * 1025),
]


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[:12] for name in NAMES])
@pytest.mark.parametrize("alias", [False, True])
def test_names_like_paths_are_refused(tmp_path, name, alias):
    def change(index):
        if alias:
            index["tensors"].append([name, 0])
        else:
            index["tensors"][0][0] = name

    (tmp_path / "m").write_bytes(reseal(pack(*compressed()), change))

    with pytest.raises(ArtifactError, match="is no name of a tensor, but empty, too long or like a path"):
        load_compressed(tmp_path / "m")


@pytest.mark.parametrize("name", ["weight:0", "net.0.weight", "größe", "a b", "_orig_mod.x", "x" * 1024, "-", "C:"])
def test_unusual_names_that_are_no_paths_are_read(tmp_path, name):
    def change(index):
        index["tensors"][1][0] = name

    (tmp_path / "m").write_bytes(reseal(pack(*compressed()), change))

    assert list(load_compressed(tmp_path / "m"))[1] == name


def test_names_that_stand_twice_in_the_index_are_refused(tmp_path):
    def change(index):
        index["tensors"].append(["head.bias", "float32", [0], 0])

    (tmp_path / "m").write_bytes(reseal(pack(*compressed()), change))

    with pytest.raises(ArtifactError, match="names are not unique"):
        load_compressed(tmp_path / "m")


def rewrite(change):
    """Change the text of the header of a good file, and seal it."""
    data = pack(*compressed())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["sha256"] = "0" * 64
    text = change(json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda text: text.replace('"rest"', '"stream"'), "an object that has a key twice"),
        (lambda text: text[:-1] + ', "rest": 5}', "an object that has a key twice"),
        (
            lambda text: text.replace('"rest"', '"../rest"'),
            r"expected the tensors .* got \['../rest', 'index', 'stream",
        ),
        (lambda text: text[:-1] + ', "": 5}', r"expected the tensors .* got \['', 'index'"),
        (lambda text: text.replace('"U32"', '"F32"'), "expected stream of dtype U32 and one dimension from byte 0"),
        (lambda text: text.replace('"shape": [', '"shape": [1, ', 1), "expected stream of dtype U32 and one dimension"),
        (lambda text: text.replace('"data_offsets": [0', '"data_offsets": [4'), "expected stream of dtype U32"),
        (lambda text: text.replace('"data_offsets": [0', '"data_offsets": [false'), "expected stream of dtype U32"),
        (lambda text: text[:-1] + ', "x": ' + "[" * 30000 + "]" * 30000 + "}", "expected a header of one JSON object"),
        (lambda text: "[1]", "expected a header of one JSON object"),
        (lambda text: text.replace('"1"', '"4"'), "was written by version 4 of the format, this package reads 1, 2, 3"),
        (lambda text: text.replace('"1"', "1.5"), r"was written by version 1\.5 of the format"),
        (lambda text: text.replace("xai", "vai"), "is not a packed file: expected format 'lightning-xai-compress'"),
        (lambda text: text + " " * (1 << 16), "expected a header of at most 65536 bytes, a multiple of 8, got 6"),
    ],
)
def test_a_sealed_header_that_is_not_ours_is_refused(tmp_path, change, error):
    (tmp_path / "m").write_bytes(rewrite(change))

    with pytest.raises(ArtifactError, match=error):
        load_compressed(tmp_path / "m")


def test_a_header_in_other_words_is_read(tmp_path):
    (tmp_path / "m").write_bytes(rewrite(lambda text: text.replace(",", " ,\n")))

    assert_same(load_compressed(tmp_path / "m"), compressed()[0])


@pytest.mark.parametrize("declared", [1 << 63, (1 << 64) - 1, 1 << 40])
def test_a_header_of_impossible_length_is_refused(tmp_path, declared):
    data = pack(*compressed())
    (tmp_path / "m").write_bytes(declared.to_bytes(8, "little") + data[8:])

    with pytest.raises(ArtifactError, match=f"cut short or no safetensors file: expected a header of {declared} bytes"):
        load_compressed(tmp_path / "m")


def test_rows_without_number_are_refused_before_time_is_taken(tmp_path):
    data = reseal(pack(*compressed()), _tensor(0, 2, [1 << 17, 1]))
    (tmp_path / "m").write_bytes(data)

    with pytest.raises(ArtifactError, match="rows of coded tensors: expected at most 65536"):
        load_compressed(tmp_path / "m")


@pytest.mark.parametrize(("kind", "width"), [(1, 1), (2, 2)])
def test_rows_of_another_kind_are_refused(tmp_path, kind, width):
    scales = np.array([0x3F80, 0x3F80], np.uint16) if kind == 1 else None
    encoded = encode([Block(np.ones((2, 3), np.int8), np.full(2, width, np.uint8), scales)])
    index = {"tensors": [["w", "float32", [2, 3], kind]], "contexts": encoded.header.contexts}
    index |= {"scales": encoded.header.scales, "planes": [0] * 4}
    parts = {"stream": encoded.words, "rest": np.zeros(4 * 6, np.uint8), "index": write_json(index)}
    (tmp_path / "m").write_bytes(write_container(parts))

    with pytest.raises(ArtifactError, match="w has rows of another kind"):
        load_compressed(tmp_path / "m")


def test_a_truth_value_of_two_is_refused(tmp_path):
    model = torch.nn.Module()
    model.register_buffer("flags", torch.tensor([True, False, True]))
    data = pack(model, CompressionPlan(Mask({})))
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert body.startswith(b"\1\0\1")
    (tmp_path / "m").write_bytes(seal(header, b"\2" + body[1:]))

    with pytest.raises(ArtifactError, match="flags holds truth values other than 0 and 1"):
        load_compressed(tmp_path / "m")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(pack(*compressed()))

    with pytest.raises(ArtifactError, match="was changed while it was read"), open_container(path):
        path.write_bytes(path.read_bytes() + b"more")


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    model, plan = compressed()
    (tmp_path / "m").write_bytes(pack(model, plan))

    assert_same(load_compressed(tmp_path / "m", Net()).state_dict(), model)
    assert len(read_packed(tmp_path / "m").tensors) == len(model.state_dict())
    with pytest.raises(AssertionError, match="pickle"):
        pickle.loads(b"")
