import hashlib
import json
import math
import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.packed import check_packed, load_compressed, pack, packed_size, write_packed
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask, Skipped

FOREIGN = [
    "lightning",
    "pytorch_lightning",
    "zennit",
    "torchao",
    "torchmetrics",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime",
]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_tensor_comes_back_exactly(tmp_path, dtype):
    torch.manual_seed(0)
    model = Net().to(dtype)
    plan = quantize(model, ["conv.weight", "head.weight"])
    assert (model.head.weight != 0).any()

    assert_same(round_trip(model, plan, tmp_path / "m"), model)


def test_a_fresh_model_is_filled_in_and_returned(tmp_path):
    model, plan = compressed()
    (tmp_path / "m").write_bytes(pack(model, plan))
    torch.manual_seed(1)
    fresh = Net()

    assert load_compressed(tmp_path / "m", fresh) is fresh
    assert_same(fresh.state_dict(), model)


def test_the_writer_reports_no_difference(tmp_path):
    model, plan = compressed()

    write_packed(model, plan, tmp_path / "m")

    assert check_packed(tmp_path / "m", model) == 0.0
    assert (tmp_path / "m").read_bytes() == pack(model, plan)


def test_the_same_model_and_plan_give_the_same_bytes():
    assert pack(*compressed()) == pack(*compressed())


def test_another_weight_gives_other_bytes():
    model, plan = compressed()
    before = pack(model, plan)
    with torch.no_grad():
        model.norm.bias[3] += 1

    assert pack(model, plan) != before


def test_plain_safetensors_opens_the_file(tmp_path):
    (tmp_path / "m").write_bytes(pack(*compressed()))

    with safetensors.safe_open(tmp_path / "m", framework="np") as file:
        assert set(file.keys()) == {"stream", "rest", "index"}
        assert file.metadata()["version"] == "1"
        index = json.loads(zlib.decompress(file.get_tensor("index").tobytes()))
    assert index["skipped"] == [["embed", "embedding"]]


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    untied = quantize(model, ["0.weight"])
    once = len(pack(model, untied))
    model[1].weight = model[0].weight
    plan = quantize(model, ["0.weight"])

    state = round_trip(model, plan, tmp_path / "m")

    assert_same(state, model)
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()
    assert len(pack(model, plan)) < once - 4000  # 6400 bytes of floats less


def test_a_plan_may_name_the_second_key_of_a_tied_weight(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight

    assert_same(round_trip(model, quantize(model, ["1.weight"]), tmp_path / "m"), model)


def test_a_file_of_untied_weights_does_not_fill_a_tied_model(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    (tmp_path / "m").write_bytes(pack(model, quantize(model, ["0.weight"])))
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    before = tied[0].weight.clone()

    with pytest.raises(ArtifactError, match=r"different values for 0\.weight, 1\.weight, which share one tensor"):
        load_compressed(tmp_path / "m", tied)
    assert torch.equal(tied[0].weight, before)


@pytest.mark.parametrize(
    "weight", [torch.zeros(6, 9), torch.randn(1, 30), torch.zeros(1, 1)], ids=["all zero", "one channel", "one zero"]
)
def test_odd_layers_come_back(tmp_path, weight):
    model = nn.Linear(weight.shape[1], weight.shape[0])
    plan = quantize(model, ["weight"], sparsity=0.0)
    if not weight.any():
        nn.init.zeros_(model.weight)

    assert_same(round_trip(model, plan, tmp_path / "m"), model)


def test_a_layer_without_any_weight_comes_back(tmp_path):
    model = nn.utils.skip_init(nn.Linear, 0, 4)
    nn.init.ones_(model.bias)
    plan = CompressionPlan(
        Mask({"weight": torch.ones(4, 0, dtype=torch.bool)}),
        BitAllocation({"weight": torch.full((4,), 8, dtype=torch.uint8)}, {"weight": 0}),
        {"weight": torch.ones(4)},
    )

    assert_same(round_trip(model, plan, tmp_path / "m"), model)


def test_channels_of_scale_zero_and_smallest_scales_come_back(tmp_path):
    model = nn.Linear(3, 3)
    scale = torch.tensor([0.0, 2.0**-133, 2.0**120])  # nothing, the smallest of bfloat16, a large one
    codes = torch.tensor([[0.0, 0, 0], [1, -1, 0], [0, 0, 127]])
    with torch.no_grad():
        model.weight.copy_(codes * scale[:, None])
    plan = CompressionPlan(
        Mask({}),
        BitAllocation({"weight": torch.tensor([4, 2, 8], dtype=torch.uint8)}, {"weight": 3}),
        {"weight": scale},
    )

    assert_same(round_trip(model, plan, tmp_path / "m"), model)


def test_negative_zeros_of_a_quantized_weight_come_back_as_zeros(tmp_path):
    model, plan = compressed()
    with torch.no_grad():
        model.head.weight[model.head.weight == 0] = -0.0

    state = round_trip(model, plan, tmp_path / "m")

    assert_same(state, model)
    assert not torch.signbit(state["head.weight"][state["head.weight"] == 0]).any()


def test_what_is_not_quantized_comes_back_bit_for_bit(tmp_path):
    model = nn.Module()
    values = {
        "floats": torch.tensor([math.nan, -0.0, math.inf, 1e-45]),
        "halves": torch.tensor([math.nan, -0.0, 65504.0], dtype=torch.float16),
        "counter": torch.tensor(-(2**62)),
        "flags": torch.tensor([[True], [False]]),
        "waves": torch.tensor([1 + 2j, -0.0j]),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "eighths": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
        "nothing": torch.empty(0, 3),
    }
    for name, value in values.items():
        model.register_buffer(name, value)

    state = round_trip(model, CompressionPlan(Mask({})), tmp_path / "m")

    assert state.keys() == values.keys()
    for name, value in values.items():
        assert state[name].dtype == value.dtype
        assert state[name].shape == value.shape
        assert state[name].reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_floats_are_stored_as_a_bitmap_and_what_was_kept(tmp_path, dtype):
    model = nn.Linear(200, 100, bias=False).to(dtype)
    keep = torch.rand(100, 200) < 0.1
    with torch.no_grad():
        model.weight.mul_(keep)
    plan = CompressionPlan(Mask({"weight": keep}))

    assert_same(round_trip(model, plan, tmp_path / "m"), model)
    kept = int(keep.sum())
    entropy = 20000 * -(kept / 20000 * math.log2(kept / 20000) + (1 - kept / 20000) * math.log2(1 - kept / 20000)) / 8
    size = packed_size(model, plan)
    assert size.payload < 1.01 * entropy + 30
    assert 0.7 * kept * model.weight.element_size() < size.rest <= kept * model.weight.element_size()
    assert size.layers["weight"] == pytest.approx(size.payload + size.rest, abs=2)


def test_a_layer_pruned_to_nothing_takes_next_to_nothing(tmp_path):
    model = nn.Linear(1000, 100, bias=False)
    nn.init.zeros_(model.weight)
    plan = CompressionPlan(Mask({"weight": torch.zeros(100, 1000, dtype=torch.bool)}))

    assert_same(round_trip(model, plan, tmp_path / "m"), model)
    assert len(pack(model, plan)) < 700


@pytest.mark.parametrize(("spread", "sparsity", "width"), [(0.3, 0.9, 4), (1.0, 0.5, 8), (0.8, 0.0, 3), (1.0, 0.0, 2)])
def test_alike_channels_take_their_entropy(spread, sparsity, width):
    rng = np.random.default_rng(0)
    high = 2 ** (width - 1) - 1
    codes = np.clip(np.rint(rng.laplace(0, spread * high / 3, (512, 576))), -high, high)
    codes[rng.random(codes.shape) < sparsity] = 0
    scale = torch.from_numpy(np.exp(rng.normal(0, 0.3, 512))).to(torch.bfloat16).float()
    model = nn.Linear(576, 512, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(codes) * scale[:, None])
    plan = CompressionPlan(
        Mask({}),
        BitAllocation({"weight": torch.full((512,), width, dtype=torch.uint8)}, {"weight": 576}),
        {"weight": scale},
    )
    share = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(share * np.log2(share)).sum() * codes.size / 8

    size = packed_size(model, plan)

    assert 0.99 * entropy < size.payload < 1.01 * entropy
    assert 512 * 6 / 8 < size.scales < 0.7 * 2 * 512  # bfloat16 would take 1024 bytes


def test_unlike_channels_take_less_than_the_entropy_of_their_layer():
    model, plan = compressed(classes=300)
    rows = model.head.weight.detach().flatten(1) / plan.scales["head.weight"].clamp_min(1e-30)[:, None]
    share = np.unique(rows.round().numpy(), return_counts=True)[1] / rows.numel()
    entropy = -(share * np.log2(share)).sum() * rows.numel() / 8

    assert packed_size(model, plan).payload < entropy


def test_the_parts_of_a_size_add_up():
    model, plan = compressed()

    size = packed_size(model, plan)

    assert size.total == len(pack(model, plan)) == size.payload + size.scales + size.rest + size.metadata
    assert size.layers.keys() == {"conv.weight", "head.weight"}
    assert sum(size.layers.values()) == pytest.approx(size.payload + size.scales, abs=2)
    assert size.layers["conv.weight"] > size.layers["head.weight"] > 50


def test_weights_off_their_grid_are_refused_by_name():
    model, plan = compressed()
    with torch.no_grad():
        model.head.weight[7, 3] = 0.123
    plan = CompressionPlan(Mask({}), plan.allocation, plan.scales)

    with pytest.raises(ArtifactError, match=r"head\.weight: .*scale times an integer.*channel 7 .*\(1 such weights\)"):
        pack(model, plan)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    model, plan = compressed()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = value
    plan = CompressionPlan(Mask({}), plan.allocation, plan.scales)

    with pytest.raises(ArtifactError, match=r"conv\.weight: .*scale times an integer"):
        pack(model, plan)


def test_codes_beyond_their_bit_width_are_refused():
    model, plan = compressed()
    scale = plan.scales["head.weight"][0]  # of 2 bits: codes in -1..1
    with torch.no_grad():
        model.head.weight[0, 0] = 2 * scale
    plan = CompressionPlan(Mask({}), plan.allocation, plan.scales)

    with pytest.raises(ArtifactError, match=r"head\.weight: .*channel 0 has 2 bits"):
        pack(model, plan)


def test_weights_that_should_be_pruned_are_refused():
    model, plan = compressed()
    row, column = (~plan.mask["head.weight"]).nonzero()[0]
    with torch.no_grad():
        model.head.weight[row, column] = plan.scales["head.weight"][row]

    with pytest.raises(ArtifactError, match=r"head\.weight: expected zeros where the mask prunes, got 1 other"):
        pack(model, plan)


@pytest.mark.parametrize("scale", [0.1, -0.5, math.inf, math.nan])
def test_scales_that_bfloat16_cannot_hold_are_refused(scale):
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    allocation = BitAllocation({"weight": torch.tensor([4], dtype=torch.uint8)}, {"weight": 2})

    with pytest.raises(ArtifactError, match="weight: expected scales >= 0 that bfloat16 holds exactly"):
        pack(model, CompressionPlan(Mask({}), allocation, {"weight": torch.tensor([scale])}))


def test_plans_of_another_model_are_refused():
    plan = compressed()[1]

    with pytest.raises(ArtifactError, match=r"the plan names what \w+ lacks: conv\.weight, head\.weight"):
        pack(nn.Linear(3, 3), plan)
    with pytest.raises(ArtifactError, match=r"head\.weight: expected a mask of shape \(12, 24\), got \(10, 24\)"):
        pack(Net(classes=12), CompressionPlan(Mask({"head.weight": plan.mask["head.weight"]})))
    with pytest.raises(ArtifactError, match=r"head\.weight: expected bit widths and scales for the 12 channels"):
        pack(Net(classes=12), CompressionPlan(Mask({}), *_only(plan, "head.weight")))


def _only(plan, name):
    allocation = BitAllocation({name: plan.allocation[name]}, {name: plan.allocation.channel_size[name]})
    return allocation, {name: plan.scales[name]}


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"anything": 1}

    def set_extra_state(self, state):
        pass


def test_extra_state_is_refused_by_name(tmp_path):
    with pytest.raises(ArtifactError, match=r"_extra_state: expected a tensor in the state dict, got dict"):
        pack(Extra(2, 2), CompressionPlan(Mask({})))
    (tmp_path / "m").write_bytes(pack(nn.Linear(2, 2), CompressionPlan(Mask({}))))
    with pytest.raises(ArtifactError, match="no tensors with memory of their own: _extra_state"):
        load_compressed(tmp_path / "m", Extra(2, 2))


def test_tensors_without_values_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"weight: expected a dense tensor with values, got torch\.float32"):
        pack(nn.Linear(2, 2, device="meta"), CompressionPlan(Mask({})))
    with pytest.raises(ArtifactError, match="weight: expected a dense tensor with values"):
        pack(nn.LazyLinear(2), CompressionPlan(Mask({})))
    (tmp_path / "m").write_bytes(pack(nn.Linear(2, 2), CompressionPlan(Mask({}))))
    with pytest.raises(ArtifactError, match="no tensors with memory of their own: weight, bias; build it on a real"):
        load_compressed(tmp_path / "m", nn.Linear(2, 2, device="meta"))


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
    with pytest.raises(ArtifactError, match="damaged or cut short: expected SHA-256"):
        load_compressed(tmp_path / "m")


def test_another_version_is_refused_by_number(tmp_path):
    data = pack(*compressed()).replace(b'"version":"1"', b'"version":"7"', 1)
    (tmp_path / "m").write_bytes(data)

    with pytest.raises(ArtifactError, match=r"written by version 7 of the format, this package reads 1: install"):
        load_compressed(tmp_path / "m")


def test_a_plain_safetensors_file_is_refused(tmp_path):
    safetensors.torch.save_file({"weight": torch.ones(3)}, tmp_path / "m")

    with pytest.raises(ArtifactError, match=r"not a packed file: expected format .* got None; .*load_file"):
        load_compressed(tmp_path / "m")


def test_a_missing_file_is_simply_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "m")


def test_another_model_is_refused_with_all_that_differs_and_untouched(tmp_path):
    model, plan = compressed()
    (tmp_path / "m").write_bytes(pack(model, plan))
    other = Net(classes=12)
    del other.embed
    other.norm.double()
    other.gain = nn.Parameter(torch.zeros(2))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}

    with pytest.raises(ArtifactError) as raised:
        load_compressed(tmp_path / "m", other)

    text = str(raised.value)
    assert "missing in the file: gain" in text
    assert "unexpected in the file: embed.weight" in text
    assert "head.weight (model (12, 24), file (10, 24))" in text
    assert "norm.weight (model torch.float64, file torch.float32)" in text
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_expanded_buffers_are_refused_before_anything_is_written(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("shift", torch.zeros(3))
    (tmp_path / "m").write_bytes(pack(model, CompressionPlan(Mask({}))))
    model.shift = torch.zeros(1).expand(3)

    with pytest.raises(ArtifactError, match=r"no tensors with memory of their own: shift; .*clone expanded buffers"):
        load_compressed(tmp_path / "m", model)


def test_quantized_and_merely_pruned_layers_share_a_file(tmp_path):
    model, plan = compressed()
    keep = torch.rand(11, 5) < 0.3
    with torch.no_grad():
        model.embed.weight.mul_(keep)
    plan = CompressionPlan(Mask({**plan.mask.keep, "embed.weight": keep}), plan.allocation, plan.scales)

    assert_same(round_trip(model, plan, tmp_path / "m"), model)
    assert packed_size(model, plan).layers.keys() == {"conv.weight", "embed.weight", "head.weight"}


class Refusing(nn.Linear):
    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        errors.append("not today")


def test_a_model_that_refuses_in_its_own_hooks_stays_as_it_was(tmp_path):
    (tmp_path / "m").write_bytes(pack(nn.Linear(2, 2), CompressionPlan(Mask({}))))
    model = Refusing(2, 2)
    before = model.weight.clone()

    with pytest.raises(ArtifactError, match=r"(?s)refuses it in its own loading hooks: .*not today"):
        load_compressed(tmp_path / "m", model)
    assert torch.equal(model.weight, before)


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
        _set("contexts", [[99, 0]]),
        _set("contexts", [[2, 9]]),
        _set("contexts", []),
        _set("contexts", [[1, 0]] * 500),
        _set("scales", [0, 1 << 40]),
        _set("scales", [0, 0]),
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
        _tensor(1, 3, 3),
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


@pytest.mark.parametrize("shape", [[1 << 40], [1 << 20, 1 << 20, 1 << 20, 1 << 20]])
def test_huge_declared_sizes_are_refused_before_memory_is_taken(tmp_path, shape):
    data = reseal(pack(*compressed()), _tensor(0, 2, shape))
    (tmp_path / "m").write_bytes(data)

    with pytest.raises(ArtifactError, match=r"declares \d{13,} bytes of tensors: expected at most 1073741824"):
        load_compressed(tmp_path / "m")


def test_an_index_that_unfolds_without_end_is_refused(tmp_path):
    data = pack(*compressed())
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    start = header["index"]["data_offsets"][0]
    bomb = zlib.compress(b" " * (1 << 27), 9)
    header["index"] = {"dtype": "U8", "shape": [len(bomb)], "data_offsets": [start, start + len(bomb)]}
    (tmp_path / "m").write_bytes(seal(header, body[:start] + bomb))

    with pytest.raises(ArtifactError, match="compressed bytes unfold to another length than 67108864"):
        load_compressed(tmp_path / "m")


def test_a_sealed_file_with_other_tensors_is_refused(tmp_path):
    header = {
        "__metadata__": {"format": "lightning-xai-compress", "version": "1"},
        "stream": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    (tmp_path / "m").write_bytes(seal(header, b"\0"))

    with pytest.raises(ArtifactError, match=r"expected the tensors \['index', 'rest', 'stream'\], got \['stream'\]"):
        load_compressed(tmp_path / "m")


def test_loading_needs_nothing_but_torch_numpy_safetensors_and_constriction(tmp_path):
    model, plan = compressed()
    (tmp_path / "m").write_bytes(pack(model, plan))
    script = (
        "import sys\n"
        f"for name in {FOREIGN!r}: sys.modules[name] = None\n"
        "from lightning_xai_compress import load_compressed\n"
        "print(float(load_compressed(sys.argv[1])['head.weight'].double().sum()))\n"
    )

    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "m")], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(model.head.weight.detach().double().sum())
