"""Training with activations on 8 bits."""

import onnxruntime
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import Files, MixedPrecision, Quantization

from toy import ToyNet, compression, fit


class Watched(ToyNet):
    """Remembers what the head reads in training, and whether hooks are on."""

    def __init__(self):
        super().__init__()
        self.read, self.scored = [], []

    def training_step(self, batch, batch_idx):
        handle = self.head.register_forward_hook(lambda layer, inputs, output: self.read.append(inputs[0].detach()))
        try:
            return super().training_step(batch, batch_idx)
        finally:
            handle.remove()


def test_layers_read_8_bits_from_the_start_of_quantized_training(tmp_path):
    callback = compression(tmp_path, quantization=Quantization(activations="int8"))

    model, _ = fit(tmp_path, [callback], Watched())

    start = 19  # of 32 batches
    assert all(len(values.unique()) > 256 for values in model.read[8:start])
    assert all(len(values.unique()) <= 256 for values in model.read[start:])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_floats_are_read_where_nothing_is_said(tmp_path):
    model, _ = fit(tmp_path, [compression(tmp_path)], Watched())

    assert all(len(values.unique()) > 256 for values in model.read)


def test_an_error_takes_the_hooks_off(tmp_path):
    class Failing(ToyNet):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 25:
                raise RuntimeError("power cut")

    model = Failing()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, [compression(tmp_path, quantization=Quantization(activations="int8"))], model)

    assert not any(module._forward_pre_hooks for module in model.modules())


def test_scores_are_those_of_float_activations(tmp_path):
    seen = []

    def criterion(model, batches, layers):
        for images, _ in batches:
            handle = model.head.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].detach()))
            model(images)
            handle.remove()
        return {name: dict(model.named_parameters())[name].abs() for name in layers}

    fit(
        tmp_path,
        [compression(tmp_path, criterion=criterion, relevance_epochs=1, quantization=Quantization(activations="int8"))],
    )

    assert len(seen) > 8
    assert all(len(values.unique()) > 256 for values in seen)


def test_the_onnx_file_computes_as_the_model_was_trained(tmp_path):
    callback = compression(
        tmp_path,
        formats=("safetensors", "onnx"),
        files=Files(activations="int8"),
        quantization=Quantization(activations="int8"),
    )
    model, run = fit(tmp_path, [callback])
    images = run.datamodule.data.tensors[0]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    with torch.no_grad():
        exact = model.eval()(images)

    assert callback.report.artifacts[1].max_abs_diff > 1e-4  # activations are rounded
    assert float((got - exact).abs().max()) < 0.1 * float(exact.abs().max())
    assert float((got.argmax(1) == exact.argmax(1)).float().mean()) > 0.95


def test_the_report_holds_the_accuracy_of_the_file_with_8_bit_activations(tmp_path):
    metric = MulticlassAccuracy(4, average="micro")
    callback = compression(tmp_path, formats=("onnx",), files=Files(activations="int8"), metric=metric)
    _, run = fit(tmp_path, [callback])
    images, labels = run.datamodule.data.tensors
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])

    assert callback.report.int8_accuracy == pytest.approx(float((got.argmax(1) == labels).float().mean()))


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="activations must be None or 'int8', got 'int4'"):
        Quantization(activations="int4")
    assert MixedPrecision().quantization == Quantization()
