import json
import math
import subprocess
import sys
import zlib

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from lightning_xai_compress.formats.packed import check_packed, load_compressed, pack, packed_size, write_packed
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask

from packed_nets import Net, assert_same, compressed, quantize, round_trip

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
    "safetensors",
]


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


def test_quantized_and_merely_pruned_layers_share_a_file(tmp_path):
    model, plan = compressed()
    keep = torch.rand(11, 5) < 0.3
    with torch.no_grad():
        model.embed.weight.mul_(keep)
    plan = CompressionPlan(Mask({**plan.mask.keep, "embed.weight": keep}), plan.allocation, plan.scales)

    assert_same(round_trip(model, plan, tmp_path / "m"), model)
    assert packed_size(model, plan).layers.keys() == {"conv.weight", "embed.weight", "head.weight"}


def test_loading_needs_nothing_but_torch_numpy_and_constriction(tmp_path):
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
