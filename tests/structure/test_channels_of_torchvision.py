"""Half of the operations of well-known models: the smaller one computes what the masked one does, as ONNX, too."""

import onnxruntime
import pytest
import torch
import torchvision

from lightning_xai_compress import CompressionPlan, Inputs, Mask, save
from lightning_xai_compress.layers import find_layers
from lightning_xai_compress.structure import Cost, channel_mask, find_channels, macs_of, select_channels, shrunk

pytest.importorskip("torch_pruning")

SIZES = {
    "resnet18": 64, "vgg11_bn": 32, "mobilenet_v2": 64, "densenet121": 64, "convnext_tiny": 64, "vit_b_16": 224,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_half_of_the_operations_go(tmp_path, name):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    x = torch.randn(2, 3, SIZES[name], SIZES[name])
    weights = {key: each for key, each in model.named_parameters() if key in find_layers(model).names}
    groups, _ = find_channels(model, (x,), {}, weights)
    counted, rest = macs_of(model, lambda: model(x))
    rest += sum(count for key, count in counted.items() if key not in weights)
    prices = {key: counted[key] / each.numel() for key, each in weights.items() if key in counted}
    cost = Cost(groups, {key: each.shape for key, each in weights.items()}, prices, rest)

    removed = select_channels(groups, {group.name: torch.rand(len(group)) for group in groups}, cost, 0.5)

    mask = channel_mask(groups, removed, weights)
    with torch.no_grad():
        for key, each in weights.items():
            each.mul_(mask[key])
        expected = model(x)
        with shrunk(model, groups, removed):
            found = model(x)
            left, other = macs_of(model, lambda: model(x))
            keep = {key: torch.ones_like(each, dtype=torch.bool) for key, each in model.named_parameters()}
            plan = CompressionPlan(Mask({key: keep[key] for key in weights}))
            save(model, plan, tmp_path, formats=["onnx"], examples=[Inputs((x,))])
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    assert (sum(left.values()) + other) / (sum(counted.values()) + rest) == pytest.approx(cost.share, rel=1e-3)
    assert 0.45 < cost.share <= 0.5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert float((torch.from_numpy(output) - expected).abs().max()) <= 1e-4 * scale
