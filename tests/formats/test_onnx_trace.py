"""Tracing: dynamic sizes, names, and the model untouched."""

import re
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from torch import nn

from lightning_xai_compress.formats.onnx import onnx_session
from lightning_xai_compress.formats.registry import Inputs

from onnx_nets import NETWORKS, export, quantize

onnx = pytest.importorskip("onnx")


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


class OneHead(nn.Module):
    """Attention without an axis for heads."""

    def __init__(self, mask):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.mask = mask

    def forward(self, x):
        mask = {"shared": torch.ones(5, 5).tril().bool(), "each": x[:, :, :1] * x[:, None, :, 1] > -1}.get(self.mask)
        causal = self.mask == "causal"
        return nn.functional.scaled_dot_product_attention(self.fc(x), x, 2 * x, mask, is_causal=causal, scale=0.3)


@pytest.mark.parametrize("mask", ["none", "causal", "shared", "each"])
def test_attention_without_an_axis_for_heads_is_written(tmp_path, mask):
    model = OneHead(mask)
    inputs = torch.randn(3, 5, 6)

    export(model, quantize(model, widths=(8,)), tmp_path / "m.onnx", [Inputs((inputs,))])

    session = onnx_session(tmp_path / "m.onnx")
    for batch in (inputs, inputs[:1], torch.randn(7, 5, 6)):
        expected = model(batch)
        assert expected.isfinite().all()
        got = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
        np.testing.assert_allclose(got, expected.detach().numpy(), rtol=0, atol=1e-5)


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
