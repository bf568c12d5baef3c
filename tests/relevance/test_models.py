"""Whole models of the kinds that people have: what runs, what is known, and what is named instead."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import SqueezeExcitation

from lightning_xai_compress import score


def build(name):
    torch.manual_seed(0)
    settings = {"image_size": 32} if name.startswith("vit") else {}
    model = getattr(torchvision.models, name)(num_classes=10, **settings)
    if name.startswith("vgg"):  # its 120 million weights of Linear layers add nothing but time
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Linear(512, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].reset_parameters()  # zeros in ViT
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))  # without running statistics a signal dies out in a random network
    return model


def weights_of(model, *types):
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, types)}


def fingerprint(model):
    return {
        name: (id(each), each._version, each.detach().sum().item())
        for name, each in [*model.named_parameters(), *model.named_buffers()]
    }


@pytest.mark.parametrize(
    "name",
    [
        "resnet18", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "efficientnet_b0", "convnext_tiny",
        "vit_b_16", "swin_t",
    ],
)  # fmt: skip
def test_models_of_torchvision_are_scored_and_what_is_unknown_is_listed(name):
    model = build(name)
    before = fingerprint(model)

    scores = score(model, [(torch.randn(2, 3, 32, 32), torch.tensor([1, 7]))])

    assert fingerprint(model) == before
    gates = {
        f"{name}.{part}.weight"
        for name, module in model.named_modules()
        if isinstance(module, SqueezeExcitation)
        for part in ("fc1", "fc2")
    }
    packed = {
        f"{name}.in_proj_weight" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    assert set(scores.score) == weights_of(model, nn.Conv2d, nn.Linear) | packed
    assert set(scores.unknown) == gates
    assert (name in ("mobilenet_v3_small", "efficientnet_b0")) == bool(gates)
    for kind in ("score", "relevance", "sensitivity"):
        for key, each in getattr(scores, kind).items():
            assert key in gates or torch.isfinite(each).all(), key
            assert key in gates or each.any(), key
    listed = {entry.name: entry.reason for entry in scores.skipped}
    assert all("relevance unknown" in listed[name] for name in gates)
    others = {
        layer or type(model).__name__
        for layer, module in model.named_modules()
        if any(each is not None and each.dim() > 1 for each in module._parameters.values())
        and not isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention)
    }
    assert set(listed) == gates | others
    assert all("holds weights of its own" in listed[name] for name in others)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121"])
def test_with_epsilon_zero_rectifier_networks_get_gradient_times_weight(name):
    model = build(name).double()
    for head in [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]:
        head.bias.data.fill_(1000.0)
    x, y = torch.randn(2, 3, 32, 32).double(), torch.tensor([1, 7])

    scores = score(model, [(x, y)], explain="logit", epsilon=0.0)

    assert scores.samples == 2
    assert scores.unknown == []
    model.eval()(x).gather(1, y.unsqueeze(1)).sum().backward()
    parameters = dict(model.named_parameters())
    for key, relevance in scores.relevance.items():
        expected = parameters[key].grad * parameters[key].detach() / 2
        torch.testing.assert_close(relevance, expected, rtol=1e-9, atol=1e-11 * expected.abs().max().item())
        assert expected.any()


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense, self.dropout = nn.Linear(width, width), nn.Dropout(0.1)

    def forward(self, x, mask, half):
        q, k, v = (
            layer(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = torch.matmul(half(q), half(k).transpose(-1, -2)) / q.shape[-1] ** 0.5
        weights = self.dropout(nn.functional.softmax(scores + mask, dim=-1))
        context = torch.matmul(half(weights), half(v)).permute(0, 2, 1, 3).contiguous()
        return self.dense(context.view(*x.shape))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = Attention(width, 2)
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, mask, half, gelu, norm):
        x = norm(self.norm, x + self.attention(x, mask, half))
        return norm(self.last, x + self.second(gelu(self.first(x))))


class Encoder(nn.Module):
    """Takes and gives what a sequence classifier of Hugging Face does; how rules act can be put in its place."""

    def __init__(self, width=8):
        super().__init__()
        self.words, self.positions = nn.Embedding(11, width, padding_idx=0), nn.Embedding(6, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, 3)
        self.double()
        self.classifier.bias.data.fill_(30.0)
        self.rules = {
            "half": lambda x: x,
            "gelu": F.gelu,
            "norm": lambda module, x: module(x),
            "tanh": torch.tanh,
        }

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        rules = {**self.rules}
        norm, tanh = rules["norm"], rules.pop("tanh")
        positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        x = norm(self.norm, self.words(input_ids) + self.positions(positions))
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for block in self.blocks:
            x = block(x, mask, **rules)
        logits = self.classifier(tanh(self.pooler(x[:, 0])))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def held_norm(module, x):
    mean = x.mean(-1, keepdim=True)
    std = (x.var(-1, keepdim=True, correction=0) + module.eps).sqrt().detach()
    return (x - mean) / std * module.weight + module.bias


TWIN = {
    "half": lambda x: x / 2 + x.detach() / 2,
    "gelu": lambda x: x * (F.gelu(x) / x).detach(),
    "norm": held_norm,
    "tanh": lambda x: x * (torch.tanh(x) / x).detach(),
}


def test_an_encoder_in_the_style_of_hugging_face_scores_like_its_twin_with_rules_written_out():
    torch.manual_seed(0)
    model = Encoder()
    ids = torch.tensor([[1, 4, 4, 0, 0], [1, 5, 6, 7, 2]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([2, 0])}

    scores = score(model, [batch], explain="logit", epsilon=0.0)

    assert scores.samples == 2
    assert scores.unknown == []
    assert {each.name: each.reason.partition(" (")[0] for each in scores.skipped} == {
        "words.weight": f"relevance unknown for {model.words.num_embeddings - 6} of {model.words.num_embeddings} rows",
        "positions.weight": "relevance unknown for 1 of 6 rows",
    }
    rows = {name: ~each.isnan().all(1) for name, each in scores.score.items()}
    assert rows["words.weight"].nonzero().flatten().tolist() == [1, 2, 4, 5, 6, 7]  # padding explains nothing
    assert rows["positions.weight"].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    model.rules = TWIN
    model.eval()(**batch).logits.gather(1, batch["labels"].unsqueeze(1)).sum().backward()
    parameters = dict(model.named_parameters())
    for name, relevance in scores.relevance.items():
        expected = parameters[name].grad * parameters[name].detach() / 2
        torch.testing.assert_close(relevance[rows[name]], expected[rows[name]], rtol=1e-8, atol=1e-12, msg=name)
        assert not expected[~rows[name]].any()


class Segmenter(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.down, self.middle = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(6, classes, 1)

    def forward(self, x):
        z = F.relu(self.down(x))
        z = F.relu(self.up(z + F.relu(self.middle(z))))
        return {"out": self.head(torch.cat([x, z], 1))}  # as torchvision's do


IGNORED = torch.randint(0, 3, (3, 6, 6), generator=torch.Generator().manual_seed(0))
IGNORED[0, :2] = -100
LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
VALUES = torch.tensor([[0.5, -2.0, 3.0], [1.0, 1.5, -1.0], [4.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("target", "pooled", "loss"),
    [
        (IGNORED, False, lambda z, t: F.cross_entropy(z, t, reduction="sum")),
        (LABELS, True, lambda z, t: F.binary_cross_entropy_with_logits(z, t.to(z), reduction="sum")),
        (VALUES, True, lambda z, t: (z - t).square().sum() / 2),
    ],
    ids=["segmentation", "several labels", "regression"],
)
def test_what_is_explained_by_default_is_the_gradient_of_the_loss(target, pooled, loss):
    torch.manual_seed(0)

    class Net(Segmenter):
        def forward(self, x):
            return super().forward(x)["out"].mean((2, 3)) if pooled else super().forward(x)

    model, x = Net(3).double(), torch.randn(3, 2, 6, 6).double()

    scores = score(model, [(x, target)], epsilon=0.0)

    assert (scores.samples, scores.left_out, scores.unknown) == (3, 0, [])
    output = model.eval()(x)
    loss(output if pooled else output["out"], target).neg().backward()
    for name, relevance in scores.relevance.items():
        parameter = dict(model.named_parameters())[name]
        torch.testing.assert_close(relevance, parameter.grad * parameter.detach() / 3, rtol=1e-9, atol=1e-14, msg=name)


class Partly(nn.Module):
    """A classifier of tokens around a part that relevance does not reach."""

    def __init__(self, part):
        super().__init__()
        self.inner, self.part, self.head = nn.Linear(6, 6), part, nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.part(self.inner(x)).mean(1))


class Gated(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.squeeze, self.excite, self.scale = nn.Linear(6, 2), nn.Linear(2, 6), scale

    def forward(self, x):
        return x * self.scale(self.excite(F.relu(self.squeeze(x.mean(1, keepdim=True)))))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        return weights.detach() @ self.value(x)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.gamma = nn.Linear(6, 6), nn.Parameter(torch.full((1, 6), 1e-2))

    def forward(self, x):
        return x + self.gamma * self.fc(x)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(6, 6, batch_first=True)

    def forward(self, x):
        return x + self.rnn(x)[0]


@pytest.mark.parametrize(
    ("part", "unknown", "listed"),
    [
        (Gated(torch.sigmoid), {"squeeze.weight", "excite.weight"}, {}),
        (Gated(nn.Hardsigmoid(inplace=True)), {"squeeze.weight", "excite.weight"}, {}),
        (Detached(), {"query.weight", "key.weight"}, {}),
        (LayerScale(), set(), {"": "LayerScale holds weights of its own: not scored"}),
        (Recurrent(nn.LSTM), set(), {".rnn": "recurrent layer: not scored"}),
        (Recurrent(nn.GRU), set(), {".rnn": "recurrent layer: not scored"}),
        (nn.Bilinear(6, 6, 6), set(), {"": "Bilinear holds weights of its own: not scored"}),
    ],
    ids=["squeeze-excitation", "hard", "detached", "layer scale", "LSTM", "GRU", "Bilinear"],
)
def test_what_gets_no_relevance_is_unknown_and_listed(part, unknown, listed):
    model = Partly(part).double()
    if isinstance(part, nn.Bilinear):
        part.forward = lambda x: F.bilinear(x, x, part.weight, part.bias)

    scores = score(model, [(torch.randn(4, 5, 6).double(), torch.tensor([0, 1, 2, 0]))])

    unknown = {f"part.{name}" for name in unknown}
    assert set(scores.unknown) == unknown
    assert all(scores.score[name].isnan().all() for name in unknown)
    assert all(torch.isfinite(scores.score[name]).all() for name in scores.score if name not in unknown)
    expected = dict.fromkeys(unknown, "relevance unknown (not reached by an ordinary layer call)")
    expected |= {f"part{name}": reason for name, reason in listed.items()}
    assert {entry.name: entry.reason for entry in scores.skipped} == expected
    assert "inner.weight" in scores.score
