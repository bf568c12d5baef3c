"""The ONNX file: integer weights that decode to the model's own, outputs equal, the model untouched."""

import random
import re
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import onnx as onnx_format
from lightning_xai_compress.formats.onnx import TOLERANCE, check_onnx, onnx_session, write_onnx
from lightning_xai_compress.formats.registry import FORMATS, Inputs
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

INTEGERS = {onnx.TensorProto.INT2: 2, onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}
STORED = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def quantize(model, *, widths, float_layers=()):
    """Put the weights of all Linear and Conv layers onto a symmetric grid per output channel, and say so in a plan."""
    draw = random.Random(0)
    keep, bits, scales, sizes = {}, {}, {}, {}
    wanted = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))}
    wanted |= {id(m.in_proj_weight) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, weight in model.named_parameters():
        if id(weight) not in wanted or name in float_layers:
            continue
        bits[name] = torch.tensor([draw.choice(widths) for _ in range(len(weight))], dtype=torch.uint8)
        limit = 2.0 ** (bits[name].float() - 1) - 1
        scales[name] = (weight.detach().flatten(1).abs().amax(dim=1) / limit * 1.01).bfloat16().float()
        step = scales[name].reshape(-1, *[1] * (weight.dim() - 1))
        limit = limit.reshape(step.shape)
        with torch.no_grad():
            codes = torch.where(step > 0, weight / step, torch.zeros(())).round().clamp(-limit, limit)
            weight.copy_(codes * step)
        keep[name] = torch.ones_like(weight, dtype=torch.bool)
        sizes[name] = weight[0].numel()
    return CompressionPlan(Mask(keep), BitAllocation(bits, sizes), scales)


def export(model, plan, path, examples):
    write_onnx(model, plan, path, examples)
    return check_onnx(path, model, examples)


def plain_output(path, *tensors):
    """First output of the file under onnxruntime's default options."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})[0]


def decode(path):
    """Weights of a file from its raw bytes: an independent reading of what the ONNX standard says."""
    graph = onnx.load(path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    values = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            assert [(entry.name, entry.i) for entry in node.attribute] == [("axis", 0)]
            integers, scales = (stored[name] for name in node.input)  # no zero point
            width = INTEGERS[integers.data_type]
            binary = "".join(f"{byte:08b}"[::-1] for byte in integers.raw_data)
            count = int(np.prod(integers.dims))
            digits = [binary[start : start + width][::-1] for start in range(0, count * width, width)]
            codes = [int(text, 2) - (2**width if text[0] == "1" else 0) for text in digits]
            step = np.frombuffer(scales.raw_data, "<f4").reshape(-1, *[1] * (len(integers.dims) - 1))
            values[node.output[0]] = np.array(codes, np.float32).reshape(integers.dims) * step
        elif node.op_type == "Concat" and set(node.input) <= values.keys():
            values[node.output[0]] = np.concatenate([values[name] for name in node.input])
        elif node.op_type == "Gather" and node.input[1] in stored and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]][np.frombuffer(stored[node.input[1]].raw_data, "<i4")]
    return values


def storage(path):
    """Integer types and numbers of rows of every weight."""
    found = {}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type in INTEGERS:
            assert tensor.name.endswith(f".int{INTEGERS[tensor.data_type]}")
            found.setdefault(tensor.name.rpartition(".")[0], {})[INTEGERS[tensor.data_type]] = tensor.dims[0]
    return found


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def cnn():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return net


class Reused(nn.Module):
    """One layer called twice, and a weight tied to an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.unembed = nn.Linear(6, 11)
        self.unembed.weight = self.embed.weight

    def forward(self, tokens):
        return self.unembed(self.mix(self.mix(self.embed(tokens)).tanh()))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, query, memory):
        return self.cross(query, memory, memory)[0]


NETWORKS = {
    "cnn": (cnn, (torch.randn(3, 3, 8, 8),)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)), (torch.randn(3, 6),)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)), (torch.randn(3, 5, 6),)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(3, 5, 8),)),
    "attention": (Attention, (torch.randn(3, 5, 8), torch.randn(3, 4, 8))),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 7, 3), nn.ReLU(), nn.Conv1d(7, 4, 3)), (torch.randn(3, 3, 9),)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 5, 2), nn.ReLU()), (torch.randn(3, 2, 3, 4, 5),)),
    "reused": (Reused, (torch.randint(0, 11, (3, 5)),)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_file_holds_the_weights_and_gives_the_outputs_of_the_model(tmp_path, network):
    build, tensors = NETWORKS[network]
    model = build()
    plan = quantize(model, widths=(2, 3, 4, 6, 8))
    path = tmp_path / "model.onnx"

    difference = export(model, plan, path, [Inputs(tensors)])

    assert 0 <= difference < 2e-6
    decoded = decode(path)
    for name, weight in model.named_parameters():
        if name in plan.scales:
            np.testing.assert_array_equal(decoded[name], weight.detach().numpy())
    with torch.no_grad():
        expected = model.eval()(*tensors).numpy()
    np.testing.assert_allclose(plain_output(path, *tensors), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_padding_masks_are_exported(tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    example = Inputs((torch.randn(2, 3, 8),), {"src_key_padding_mask": padding})

    assert export(model, quantize(model, widths=(2, 8)), tmp_path / "m.onnx", [example]) < 2e-6


@pytest.mark.parametrize("width", STORED)
def test_each_width_has_its_storage_type(tmp_path, width):
    model = nn.Sequential(nn.Linear(7, 5))  # 7 and 5: rows that do not fill their bytes
    path = tmp_path / "model.onnx"

    export(model, quantize(model, widths=(width,)), path, [Inputs((torch.randn(2, 7),))])

    assert storage(path) == {"0.weight": {STORED[width]: 5}}
    assert operators(path) == ["DequantizeLinear", "Gemm"]
    np.testing.assert_array_equal(decode(path)["0.weight"], model[0].weight.detach().numpy())
    proto = onnx.load(path)
    assert (proto.opset_import[0].version, proto.ir_version) == ((25, 13) if width == 2 else (21, 10))


def test_mixed_widths_are_split_by_type_and_put_back_into_order(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 4, 3))
    plan = quantize(model, widths=(2,))
    plan.allocation.bits["0.weight"].copy_(torch.tensor([8, 2, 5, 3]))  # wider is still on the grid
    path = tmp_path / "model.onnx"

    export(model, plan, path, [Inputs((torch.randn(2, 2, 5, 5),))])

    assert storage(path) == {"0.weight": {2: 1, 4: 1, 8: 2}}
    assert operators(path) == [*["DequantizeLinear"] * 3, "Concat", "Gather", "Conv"]
    np.testing.assert_array_equal(decode(path)["0.weight"], model[0].weight.detach().numpy())


def test_rows_that_are_in_order_already_are_not_gathered(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    plan = quantize(model, widths=(2,))
    plan.allocation.bits["0.weight"].copy_(torch.tensor([2, 4, 8]))
    path = tmp_path / "model.onnx"

    export(model, plan, path, [Inputs((torch.randn(2, 2, 5, 5),))])

    assert operators(path) == [*["DequantizeLinear"] * 3, "Concat", "Conv"]


def test_matrix_products_are_exact_under_default_options(tmp_path):
    model = nn.Sequential(nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 32))
    tokens = torch.randn(2, 20, 256)
    path = tmp_path / "model.onnx"

    export(model, quantize(model, widths=(8,)), path, [Inputs((tokens,))])

    expected = model(tokens).detach().numpy()
    np.testing.assert_allclose(plain_output(path, tokens), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_dead_channels_are_zero_codes(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[1] = 0
    plan = quantize(model, widths=(4,))
    path = tmp_path / "model.onnx"

    export(model, plan, path, [Inputs((torch.randn(2, 6),))])

    assert plan.scales["0.weight"][1] == 0
    np.testing.assert_array_equal(decode(path)["0.weight"], model[0].weight.detach().numpy())


def test_layers_without_an_allocation_stay_float(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    path = tmp_path / "model.onnx"

    export(model, quantize(model, widths=(4,), float_layers=["2.weight"]), path, [Inputs((torch.randn(2, 6),))])

    assert storage(path) == {"0.weight": {4: 5}}
    floats = {entry.name for entry in onnx.load(path).graph.initializer if entry.data_type == onnx.TensorProto.FLOAT}
    assert floats == {"0.weight.int4.scale", "0.bias", "2.weight", "2.bias"}


def test_a_plan_without_quantization_gives_a_float_file(tmp_path):
    model = cnn()
    mask = Mask({"0.weight": torch.ones_like(model[0].weight, dtype=torch.bool)})

    difference = export(model, CompressionPlan(mask), tmp_path / "m.onnx", [Inputs((torch.randn(2, 3, 8, 8),))])

    assert difference < 2e-6
    assert storage(tmp_path / "m.onnx") == {}


@pytest.mark.parametrize(("network", "traced"), [("cnn", 1), ("cnn", 4), ("encoder", 1)])
def test_the_batch_is_dynamic(tmp_path, network, traced):
    build, tensors = NETWORKS[network]
    model = build()
    shape = tensors[0].shape[1:]
    path = tmp_path / "model.onnx"
    export(model, quantize(model, widths=(2, 8)), path, [Inputs((torch.randn(traced, *shape),))])
    session = onnx_session(path)
    model.eval()

    assert session.get_inputs()[0].shape == ["batch", *shape]
    assert session.get_outputs()[0].shape[0] == "batch"
    for batch in (1, 3, 7):
        inputs = torch.randn(batch, *shape)
        got = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]
        np.testing.assert_allclose(got, model(inputs).detach().numpy(), rtol=0, atol=1e-5)


def test_sizes_in_which_the_examples_differ_are_dynamic(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4))
    examples = [Inputs((torch.randn(2, 5, 6),)), Inputs((torch.randn(1, 3, 6),))]

    export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", examples)

    assert onnx_session(tmp_path / "m.onnx").get_inputs()[0].shape == ["batch", "dim_1", 6]


class Branches(nn.Module):
    """Keyword and nested inputs, constants, and outputs of every kind, under names that the graph uses too."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, scale=1.0, *, mask=None, more=None):
        self.calls += 1
        self.cache = self.fc(x) * scale
        hidden = self.cache * mask[..., None] + more["a"]
        return {
            "linear": hidden,
            "pair": (hidden.mean(-1), None),
            "x": x,
            "hidden": hidden,
            "chosen": hidden.argmax(-1),
        }


def test_all_inputs_and_outputs_are_named_and_compared(tmp_path):
    model = Branches()
    plan = quantize(model, widths=(4,))
    kwargs = {"more": {"a": torch.randn(1)}, "mask": torch.ones(2, 3), "scale": 2.0}

    assert export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 3, 4),), kwargs)]) < 2e-6

    session = onnx_session(tmp_path / "m.onnx")
    assert {entry.name for entry in session.get_inputs()} == {"x_input", "mask", "more_a"}
    assert [entry.name for entry in session.get_outputs()] == ["linear", "pair_0", "x", "hidden", "chosen"]


def test_the_model_is_left_as_it_was(tmp_path):
    model = nn.Sequential(Branches(), nn.Dropout(0.5), nn.BatchNorm1d(3))
    model.forward = lambda x, mask: model[2](model[1](model[0](x, mask=mask, more={"a": x})["hidden"]))
    model[2].eval()
    model[0].fc.bias.requires_grad_(False)
    plan = quantize(model, widths=(4,))
    attributes = [{key: id(value) for key, value in vars(module).items()} for module in model.modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    before = [(name, id(tensor), tensor.clone(), tensor.requires_grad, tensor.grad) for name, tensor in tensors]
    fused = torch.backends.mha.get_fastpath_enabled()

    export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 3, 4), torch.ones(2, 3)))])

    after = [*model.named_parameters(), *model.named_buffers()]
    for (name, identity, value, requires_grad, grad), (name_after, tensor) in zip(before, after, strict=True):
        assert (name, identity, requires_grad, grad) == (name_after, id(tensor), tensor.requires_grad, tensor.grad)
        torch.testing.assert_close(tensor, value, rtol=0, atol=0)
    assert attributes == [{key: id(value) for key, value in vars(module).items()} for module in model.modules()]
    assert [module.training for module in model] == [True, True, False]
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fused


class Lightning(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        assert self.trainer is not None
        return self.net(x)

    def training_step(self, batch, index):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Export(lightning.Callback):
    def __init__(self, path):
        self.path, self.differences = path, []

    def on_train_epoch_end(self, trainer, pl_module):
        plan = quantize(pl_module, widths=(2, 4))
        self.differences.append(export(pl_module, plan, self.path, [Inputs((torch.randn(1, 4),))]))
        assert pl_module.training


def test_a_module_is_exported_in_the_middle_of_a_fit(tmp_path):
    export = Export(tmp_path / "m.onnx")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", callbacks=[export], **quiet)

    trainer.fit(Lightning(), torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4))

    assert len(export.differences) == 2
    assert max(export.differences) < 2e-6


def test_without_examples_the_error_asks_for_one(tmp_path):
    model = cnn()

    with pytest.raises(ArtifactError, match=r"traces the model with an example.*pass examples=\[Inputs\(\(x,\)\)\]"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [])


class OnData(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def test_a_model_that_branches_on_data_is_refused_with_the_reason(tmp_path, capfd):
    model = OnData().train()
    plan = quantize(model, widths=(4,))

    with pytest.raises(ArtifactError) as caught:
        export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])

    assert str(caught.value).startswith("OnData could not be traced: GuardOnDataDependentSymNode: Could not guard")
    assert "Leave formats that trace (onnx, pt2) out, or define a forward that torch.export can trace" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert model.training
    assert capfd.readouterr() == ("", "")


class FixedBatch(OnData):
    def forward(self, x):
        return self.fc(x).reshape(3, 2)


def test_a_fixed_batch_is_refused_by_the_name_of_the_input(tmp_path):
    model = FixedBatch()

    with pytest.raises(ArtifactError, match=r"Constraints violated \(x\.size\(\)\[0\]\).*no fixed batch size"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(3, 4),))])


def test_an_example_that_the_model_does_not_take_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))

    with pytest.raises(
        ArtifactError, match="Sequential cannot be called with the example: RuntimeError: mat1 and mat2"
    ):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 5),))])


def test_a_weight_off_its_grid_is_refused_by_name(tmp_path):
    model = cnn()
    plan = quantize(model, widths=(4,))
    with torch.no_grad():
        model[6].weight[3, 2] += 0.3 * plan.scales["6.weight"][3]

    with pytest.raises(
        ArtifactError, match=r"6\.weight does not lie on its grid: 1 of 96 .* channel 3 \(scale .*4 bits"
    ):
        export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 3, 8, 8),))])
    assert not (tmp_path / "m.onnx").exists()


def test_a_code_beyond_its_width_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    plan = quantize(model, widths=(4,))
    plan.allocation.bits["0.weight"].fill_(3)

    with pytest.raises(ArtifactError, match=r"0\.weight does not lie on its grid"):
        export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


def test_scales_of_another_shape_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    plan = quantize(nn.Sequential(nn.Linear(4, 3)), widths=(4,))

    with pytest.raises(ArtifactError, match=r"0\.weight has 2 output channels, but \(3,\) scales"):
        export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


def test_a_plan_of_another_model_is_refused(tmp_path):
    plan = quantize(nn.Sequential(nn.Linear(4, 3)), widths=(4,))

    with pytest.raises(ArtifactError, match=r"the plan names what Linear lacks: 0\.weight"):
        export(nn.Linear(4, 3), plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


class SecondReference(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.weights = [self.fc.weight]

    def forward(self, x):
        return x @ self.weights[0].t()


def test_a_weight_that_stays_float_in_the_graph_is_refused_by_name(tmp_path):
    model = SecondReference()

    with pytest.raises(ArtifactError, match=r"fc\.weight is in the graph, but not as the parameter of its layer"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


class Auxiliary(OnData):
    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) + self.aux(x) if self.training else self.fc(x)


def test_a_layer_that_only_training_uses_is_left_out_with_a_warning(tmp_path):
    model = Auxiliary()

    with pytest.warns(UserWarning, match=r"not in the ONNX file, since Auxiliary does not use .*: aux\.weight"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])

    assert storage(tmp_path / "m.onnx") == {"fc.weight": {4: 2}}


def test_a_difference_beyond_the_tolerance_is_refused_with_the_numbers(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 2))
    plan = quantize(model, widths=(4,))
    written = onnx_format._write

    def damage(proto, path):
        bias = next(entry for entry in proto.graph.initializer if entry.name == "0.bias")
        bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) + np.float32(0.5)).tobytes()
        written(proto, path)

    monkeypatch.setattr(onnx_format, "_write", damage)
    with pytest.raises(
        ArtifactError, match=r"output: the ONNX file differs from the model by 0\.5, which is .*0\.0001"
    ):
        export(model, plan, tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


def test_a_file_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 2))
    monkeypatch.setattr(onnx_format, "_LARGEST_FILE", 100)

    with pytest.raises(ArtifactError, match="a single file holds 2: leave 'onnx' out of formats"):
        export(model, quantize(model, widths=(4,)), tmp_path / "m.onnx", [Inputs((torch.randn(2, 4),))])


def test_the_file_says_nothing_about_the_machine_and_comes_out_the_same_twice(tmp_path):
    model = NETWORKS["encoder"][0]()
    plan = quantize(model, widths=(2, 4))
    contents = []
    for name in ("first.onnx", "second.onnx"):
        export(model, plan, tmp_path / name, [Inputs((torch.randn(2, 5, 8),))])
        contents.append((tmp_path / name).read_bytes())

    assert contents[0] == contents[1]
    text = contents[0].decode("latin-1")
    assert str(Path.home()) not in text
    assert str(Path(torch.__file__).parent) not in text
    assert not re.search(r"\.py\b|/(home|usr|tmp|root|work)/|stack_trace|namespace", text)
    assert not any(node.metadata_props for node in onnx.load(tmp_path / "first.onnx").graph.node)


def test_the_file_is_as_large_as_its_packed_bits(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 84, 3))
    plan = quantize(model, widths=(2, 3, 4, 6, 8))
    path = tmp_path / "model.onnx"

    export(model, plan, path, [Inputs((torch.randn(1, 3, 9, 9),))])

    rows = {name: [STORED[width] for width in bits.tolist()] for name, bits in plan.allocation.bits.items()}
    packed = sum(sum(widths) * plan.allocation.channel_size[name] for name, widths in rows.items()) / 8
    scales = sum(4 * len(widths) for widths in rows.values())
    rest = sum(2 * 4 * len(widths) for widths in rows.values())  # biases and the order of the rows
    assert sum(len(widths) * plan.allocation.channel_size[name] for name, widths in rows.items()) > 340_000
    assert packed + scales + rest < path.stat().st_size < packed + scales + rest + 4096


def test_the_format_is_registered():
    assert FORMATS["onnx"].write is write_onnx
    assert FORMATS["onnx"].filename == "model.onnx"
    assert (FORMATS["onnx"].needs, FORMATS["onnx"].extra) == (("onnx", "onnxscript", "onnxruntime"), "onnx")
