"""8-bit activations of a trained network: accuracy is kept, and every setting of the ranges has its effect."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_xai_compress.formats.onnx import onnx_session, write_onnx
from lightning_xai_compress.formats.onnx_int8 import quantize_activations
from lightning_xai_compress.formats.registry import Files, Inputs

from onnx_nets import quantize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

RANGES = ("minmax", "percentile", "mse")


def write(model, plan, path, images, *, activations="int8", ranges="minmax"):
    write_onnx(model, plan, path, [Inputs((images,))], Files(activations=activations, ranges=ranges))
    return path


def error(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def digits():
    """A small network trained on scikit-learn's digits, on its grid, with its plan and held-out data."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
        nn.Linear(32 * 16, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(6):
        order = torch.randperm(1200, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    plan = quantize(model, widths=(4, 8))
    return model, plan, images[:256], images[1200:], labels[1200:]


def test_accuracy_is_kept_and_each_choice_of_ranges_gives_another_file(tmp_path, digits):
    model, plan, seen, images, labels = digits
    with torch.no_grad():
        expected = model(images)
    accuracy = (expected.argmax(1) == labels).double().mean()
    assert accuracy > 0.9

    outputs = {
        ranges: onnx_session(write(model, plan, tmp_path / f"{ranges}.onnx", seen, ranges=ranges)).run(
            None, {"input": images.numpy()}
        )[0]
        for ranges in RANGES
    }

    for got in outputs.values():
        assert abs((got.argmax(1) == labels.numpy()).mean() - accuracy) <= 0.01
        assert 1e-4 < error(got, expected.numpy()) < 0.05
    assert not np.array_equal(outputs["minmax"], outputs["percentile"])
    assert not np.array_equal(outputs["minmax"], outputs["mse"])
    assert not np.array_equal(outputs["percentile"], outputs["mse"])


def test_ranges_come_from_all_inputs_that_are_given(tmp_path, digits):
    model, plan, seen, _, _ = digits
    proto = {}
    for count in (1, 2):
        path = write(model, plan, tmp_path / "m.onnx", seen, activations=None)
        proto[count] = onnx.load(path)
        feeds = [{"input": seen[:4].numpy() / 4}, {"input": seen[4:].numpy()}]
        quantize_activations(proto[count], feeds[:count])

    steps = [
        {
            e.name: float(onnx.numpy_helper.to_array(e))
            for e in each.graph.initializer
            if e.name.endswith("quantized.scale")
        }
        for each in proto.values()
    ]
    assert steps[0]["input.quantized.scale"] == pytest.approx(0.25 / 255)
    assert steps[1]["input.quantized.scale"] == pytest.approx(1 / 255)
