"""The pt2 file: torch alone runs it, it is the model bit for bit, and it holds nothing of the machine or the data."""

import json
import re
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_xai_compress.formats.pt2 import check_pt2, read_pt2, write_pt2
from lightning_xai_compress.formats.registry import FORMATS, Inputs, save
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask, Skipped

from pt2_nets import NETWORKS, WIDTHS, export, loaded, quantize
from traced_nets import Reused, cnn

MULTIPLIED = ("aten.linear", "aten.conv", "aten.embedding", "aten.matmul")


def members(path):
    with zipfile.ZipFile(path) as source:
        return {entry.filename.removeprefix("archive/"): source.read(entry) for entry in source.infolist()}


def decode(buffers, name, widths, columns):
    """The integers of a weight, digit by digit, from the buffers of a loaded program."""
    rows = {}
    for width in sorted(set(widths)):
        members = [row for row, each in enumerate(widths) if each == width]
        numbers, lowest = [0] * (len(members) * columns), 0
        for part in (1, 2, 4, 8):
            if width & part:
                octets = buffers[f"{name}.int{width}_plane{part}"].tolist()
                digits = "".join(f"{octet:08b}"[::-1] for octet in octets)
                for index in range(len(numbers)):
                    field = digits[index * part : (index + 1) * part]
                    numbers[index] += int(field[::-1], 2) << lowest
                lowest += part
        offset = 2 ** (width - 1) - 1
        for place, row in enumerate(members):
            rows[row] = [number - offset for number in numbers[place * columns : (place + 1) * columns]]
    return [rows[row] for row in sorted(rows)]


class Weights(torch.fx.Interpreter):
    """Runs a program and keeps the weights that its layers multiply by."""

    def __init__(self, module):
        super().__init__(module)
        self.met = []

    def call_function(self, target, args, kwargs):
        if str(target).startswith(MULTIPLIED):
            self.met += [arg for arg in args if isinstance(arg, torch.Tensor)]
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_and_outputs_are_the_models_own_for_every_batch_size(tmp_path, network):
    build, tensors = NETWORKS[network]
    model = build()
    plan = quantize(model)
    path = tmp_path / "model.pt2"

    assert export(model, plan, path, Inputs(tensors)) == 0.0

    program = loaded(path)
    frozen = model.eval().requires_grad_(False)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for batch in (1, 2, 7):
            args = [tensor[:1].repeat(batch, *[1] * (tensor.dim() - 1)) for tensor in tensors]
            torch.testing.assert_close(program(*args), frozen(*args), rtol=0, atol=0)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    stored = {entry.name: entry for entry in read_pt2(path).tensors}
    assert list(stored) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert stored[name].values.dtype == tensor.dtype
        assert torch.equal(stored[name].values, tensor), name
    for name, bits in plan.allocation.bits.items():
        assert stored[name].bits == {width: bits.tolist().count(width) for width in set(bits.tolist())}


@pytest.mark.parametrize("widths", [*((width,) for width in WIDTHS), WIDTHS])
def test_the_buffers_decode_by_hand_to_the_weights(tmp_path, widths):
    model = nn.Sequential(nn.Linear(7, 13))  # 7 and 13: rows that do not fill their bytes
    plan = quantize(model, widths)
    path = tmp_path / "model.pt2"

    export(model, plan, path, Inputs((torch.randn(2, 7),)))

    buffers = dict(loaded(path).named_buffers())
    codes = torch.tensor(decode(buffers, "0.weight", plan.allocation["0.weight"].tolist(), 7))
    assert buffers["0.weight.scales"].dtype == torch.bfloat16
    assert torch.equal(codes * buffers["0.weight.scales"].float()[:, None], model[0].weight.detach())
    bits = 7 * int(plan.allocation["0.weight"].sum())
    planes = [tensor for name, tensor in buffers.items() if "plane" in name]
    assert all(tensor.dtype == torch.uint8 for tensor in planes)
    assert bits <= 8 * sum(tensor.numel() for tensor in planes) < bits + 8 * len(planes)


def test_inside_the_graph_weights_equal_the_models_in_value_and_memory_order(tmp_path):
    model = cnn().to(memory_format=torch.channels_last)
    model[6].weight.data = model[6].weight.data.contiguous(memory_format=torch.channels_last)
    quantize(model)
    path = tmp_path / "model.pt2"
    export(model, quantize(model), path, Inputs((torch.randn(2, 3, 8, 8),)))

    run = Weights(loaded(path))
    run.run(torch.randn(2, 3, 8, 8))

    for index in (0, 3, 6, 9):
        weight = model[index].weight
        found = [each for each in run.met if each.shape == weight.shape and torch.equal(each, weight)]
        assert len(found) == 1, index
        assert found[0].stride() == weight.stride()


def test_extreme_codes_and_dead_rows_come_back(tmp_path):
    model = nn.Sequential(nn.Linear(255, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.stack([torch.arange(-127.0, 128.0) * 0.5, torch.zeros(255)]))
    bits = {"0.weight": torch.tensor([8, 5], dtype=torch.uint8)}
    plan = CompressionPlan(Mask({}), BitAllocation(bits, {"0.weight": 255}), {"0.weight": torch.tensor([0.5, 0.0])})

    assert export(model, plan, tmp_path / "m.pt2", Inputs((torch.randn(2, 255),))) == 0.0


def test_many_rows_take_a_wide_order(tmp_path):
    model = nn.Sequential(nn.Embedding(2**15 + 1, 1))
    plan = quantize(model, (2, 8))
    path = tmp_path / "model.pt2"

    export(model, plan, path, Inputs((torch.tensor([[0, 2**15]]),)))

    assert dict(loaded(path).named_buffers())["0.weight.order"].dtype == torch.int32


def test_tied_weights_are_stored_once(tmp_path):
    model = Reused()
    path = tmp_path / "model.pt2"
    export(model, quantize(model), path, Inputs((torch.randint(0, 11, (2, 5)),)))

    stored = {entry.name: entry for entry in read_pt2(path).tensors}
    names = [name for name in loaded(path).state_dict() if "plane" in name]
    assert {name.rpartition(".")[0] for name in names} == {"embed.weight", "mix.weight"}
    assert stored["unembed.weight"].bytes == stored["again.weight"].bytes == 0
    assert stored["unembed.weight"].values is stored["embed.weight"].values
    assert stored["embed.weight"].bytes > 0


def test_pruned_and_other_floats_stay_as_they_are(tmp_path):
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
    plan = quantize(model, float_layers=("0.weight",))
    keep = torch.rand(30, 40) > 0.9
    with torch.no_grad():
        model[0].weight.mul_(keep)
    plan = CompressionPlan(Mask({**plan.mask.keep, "0.weight": keep}), plan.allocation, plan.scales)
    path = tmp_path / "model.pt2"

    export(model, plan, path, Inputs((torch.randn(2, 40),)))

    stored = {entry.name: entry for entry in read_pt2(path).tensors}
    assert torch.equal(stored["0.weight"].values, model[0].weight)
    assert stored["0.weight"].bits == {}
    assert torch.equal(loaded(path).state_dict()["0.weight"], model[0].weight)
    assert stored["0.weight"].bytes < 0.3 * 4 * model[0].weight.numel()  # zeros are deflated


Pair = namedtuple("Pair", ["mean", "nothing"])


class Branches(nn.Module):
    """Keyword and nested inputs, constants, buffers that change or stay out of the state dict, and nested outputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x, scale=1.0, *, mask=None, more=None):
        self.calls += 1
        self.cache = self.fc(x) * scale
        hidden = self.cache * mask[..., None] + more["a"] + self.shift
        return {"hidden": hidden, "pair": (hidden.mean(-1), None), "x": x, "calls": self.calls.clone()}


def branches():
    kwargs = {"more": {"a": torch.randn(1)}, "mask": torch.ones(2, 3), "scale": 2.0}
    return Branches(), Inputs((torch.randn(2, 3, 4),), kwargs)


def test_arguments_and_outputs_have_the_structure_of_the_models(tmp_path):
    model, example = branches()
    export(model, quantize(model), tmp_path / "m.pt2", example, example)

    x, kwargs = torch.randn(5, 3, 4), {**example.kwargs, "mask": torch.rand(5, 3)}
    got, expected = loaded(tmp_path / "m.pt2")(x, **kwargs), model.eval().requires_grad_(False)(x, **kwargs)

    assert list(got) == ["hidden", "pair", "x", "calls"]
    assert got["pair"][1] is None
    for ours, theirs in ((got["hidden"], expected["hidden"]), (got["pair"][0], expected["pair"][0]), (got["x"], x)):
        assert torch.equal(ours, theirs)
    assert got["calls"] == 1
    assert [entry.name for entry in read_pt2(tmp_path / "m.pt2").tensors] == list(model.state_dict())


def test_sizes_in_which_the_examples_differ_are_dynamic_and_others_are_not(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    examples = [Inputs((torch.randn(2, 5, 6),)), Inputs((torch.randn(1, 3, 6),))]
    plan = quantize(model)
    export(model, plan, tmp_path / "both.pt2", *examples)
    export(model, plan, tmp_path / "one.pt2", examples[0])

    longer = torch.randn(4, 9, 6)
    assert torch.equal(loaded(tmp_path / "both.pt2")(longer), model(longer))
    with pytest.raises(RuntimeError, match=r"Expected input at .*shape\[1\] to be equal to 5, but got 9"):
        loaded(tmp_path / "one.pt2")(longer)


def test_the_model_is_left_as_it_was(tmp_path):
    inner, _ = branches()
    model = nn.Sequential(inner, nn.Dropout(0.5), nn.BatchNorm1d(3), nn.LSTM(4, 4, batch_first=True))
    model.forward = lambda x, mask: model[3](model[2](model[1](model[0](x, mask=mask, more={"a": x})["hidden"])))[0]
    model[2].eval()
    model[0].fc.bias.requires_grad_(False)
    plan = quantize(model)
    attributes = [{key: id(value) for key, value in vars(module).items()} for module in model.modules()]
    flat = [id(weight) for weight in model[3]._flat_weights]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    before = [(name, id(tensor), tensor.clone(), tensor.requires_grad, tensor.grad) for name, tensor in tensors]
    fused = torch.backends.mha.get_fastpath_enabled()

    export(model, plan, tmp_path / "m.pt2", Inputs((torch.randn(2, 3, 4), torch.ones(2, 3))))

    after = [*model.named_parameters(), *model.named_buffers()]
    for (name, identity, value, requires_grad, grad), (name_after, tensor) in zip(before, after, strict=True):
        assert (name, identity, requires_grad, grad) == (name_after, id(tensor), tensor.requires_grad, tensor.grad)
        torch.testing.assert_close(tensor, value, rtol=0, atol=0)
    assert attributes == [{key: id(value) for key, value in vars(module).items()} for module in model.modules()]
    assert flat == [id(weight) for weight in model[3]._flat_weights]
    assert [module.training for module in model] == [True, True, False, True]
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_the_file_says_nothing_of_machine_or_data_and_comes_out_the_same_twice(tmp_path):
    model = NETWORKS["encoder"][0]()
    plan = quantize(model)
    example = Inputs((torch.full((2, 5, 8), 0.7251),))
    for name in ("first.pt2", "second.pt2"):
        export(model, plan, tmp_path / name, example)

    assert (tmp_path / "first.pt2").read_bytes() == (tmp_path / "second.pt2").read_bytes()
    parts = members(tmp_path / "first.pt2")
    assert parts["data/sample_inputs/model.pt"] == b""
    assert not any(torch.tensor(0.7251).numpy().tobytes() in content for content in parts.values())
    for name, content in parts.items():
        if name.startswith(("models/", "extra/")) or name.endswith(".json"):
            text = content.decode()
            assert str(Path(torch.__file__).parent) not in text
            assert not re.search(r"\.py\b|/(home|usr|tmp|root|work)/|stack_trace\"|TransformerEncoder", text), name


SCRIPT = """
import torch, sys
from torch import nn
from lightning_xai_compress.formats import save
from lightning_xai_compress.formats.registry import Inputs
from lightning_xai_compress.plan import CompressionPlan, Mask
torch.manual_seed(0)
save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), CompressionPlan(Mask({})), sys.argv[1], formats=["pt2"],
     examples=[Inputs((torch.randn(2, 3, 6, 6),))])
"""


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path):
    for seed in ("1", "2"):
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / seed)]
        subprocess.run(command, check=True, timeout=300, env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"})

    assert (tmp_path / "1/model.pt2").read_bytes() == (tmp_path / "2/model.pt2").read_bytes()


def test_torch_alone_runs_the_file(tmp_path):
    model = cnn()
    x = torch.randn(2, 3, 8, 8)
    export(model, quantize(model), tmp_path / "m.pt2", Inputs((x,)))
    torch.save({"x": x, "y": model.eval().requires_grad_(False)(x)}, tmp_path / "call.pt")
    script = (
        "import sys, torch; call = torch.load(sys.argv[2]); y = torch.export.load(sys.argv[1]).module()(call['x']); "
        "assert torch.equal(y, call['y']); assert not any(name.startswith('lightning') for name in sys.modules)"
    )

    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "m.pt2"), str(tmp_path / "call.pt")]
    subprocess.run(command, check=True, timeout=300, env={"OMP_NUM_THREADS": "1"})


def test_the_file_is_about_as_large_as_its_bits(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 84, 3))
    with torch.no_grad():  # even: codes that deflate cannot make smaller
        for index in (0, 2, 4):
            model[index].weight.uniform_(-1, 1)
    plan = quantize(model)
    path = tmp_path / "model.pt2"

    export(model, plan, path, Inputs((torch.randn(1, 3, 9, 9),)))

    packed = (
        sum(int(bits.sum()) * plan.allocation.channel_size[name] for name, bits in plan.allocation.bits.items()) / 8
    )
    rows = sum(len(bits) for bits in plan.allocation.bits.values())
    assert packed > 150_000
    assert 0.97 * packed < path.stat().st_size < packed + 8 * rows + 30_000  # scale, order and bias of a row; the graph
    assert sum(entry.bytes for entry in read_pt2(path).tensors) < path.stat().st_size


def test_provenance_and_what_was_skipped_are_kept(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    plan = quantize(model, provenance={"criterion": "lrp"}, skipped=(Skipped("rnn", "recurrent layer"),))
    path = tmp_path / "model.pt2"
    export(model, plan, path, Inputs((torch.randn(2, 4),)))

    extra = {"lightning_xai_compress.json": ""}
    torch.export.load(str(path), extra_files=extra)
    assert read_pt2(path).provenance == {"criterion": "lrp"}
    assert json.loads(extra["lightning_xai_compress.json"])["skipped"] == [["rnn", "recurrent layer"]]


def test_the_format_is_registered_and_saves(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    entry = FORMATS["pt2"]
    assert (entry.write, entry.check, entry.read) == (write_pt2, check_pt2, read_pt2)
    assert (entry.filename, entry.traces, entry.needs) == ("model.pt2", True, ())

    artifact = save(model, quantize(model), tmp_path, formats=["pt2"], examples=[Inputs((torch.randn(1, 4),))])[0]

    assert artifact.max_abs_diff == 0.0
    assert artifact.bytes == (tmp_path / "model.pt2").stat().st_size


def test_outputs_are_equal_where_a_dimension_of_length_1_has_a_stride_of_its_own(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3, 2), nn.ReLU(), nn.Conv2d(48, 8, 3))
    model = model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    export(model, quantize(model), tmp_path / "model.pt2", Inputs((torch.randn(2, 1, 28, 28),)))

    run = loaded(tmp_path / "model.pt2")

    for batch in (1, 3, 16):
        x = torch.randn(batch, 1, 28, 28).contiguous(memory_format=torch.channels_last)
        assert torch.equal(run(x), model(x))
