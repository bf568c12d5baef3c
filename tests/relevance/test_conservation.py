"""Relevance is neither made nor lost: what enters a layer is what leaves it plus what its bias takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zennit.composites import LayerMapComposite, SpecialFirstLayerMapComposite
from zennit.rules import AlphaBeta, Flat, Gamma, WSquare, ZBox, ZPlus
from zennit.types import Linear

from lightning_xai_compress import score

TINY = 1e-14


def data(*shape, samples=4):
    return torch.randn(samples, *shape, dtype=torch.float64), torch.arange(samples) % 3


def build(model, *, bias):
    """In float64, norms with values of their own, with or without anything that is added."""
    model = model.double().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.5, 2.0)
            layer.running_mean.normal_(std=0.1 if bias else 0.0)
        if isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2.0)
        for name, parameter in layer.named_parameters(recurse=False):
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1 if bias else 0.0)
    return model


def explained(model, x, y):
    """Mean of the logits margin that is explained."""
    logits = model(x)
    start = F.one_hot(y, 3) - logits.softmax(1)
    return (logits * start.detach()).sum() / len(x)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 2, groups=2),
        nn.LeakyReLU(0.3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 6), nn.PReLU(), nn.Linear(6, 3)
    )  # fmt: skip


def test_every_layer_without_biases_holds_all_relevance():
    model, (x, y) = build(convolutional(), bias=False), data(2, 6, 6)

    scores = score(model, [(x, y)], epsilon=0.0, heatmaps=4)

    expected = explained(model, x, y).detach()
    assert expected.abs() > 1e-3
    assert len(scores.relevance) == 4
    for relevance in (*scores.relevance.values(), scores.heatmaps.relevance / 4):
        assert_equal(relevance.sum(), expected)


def test_what_a_layer_hands_on_is_what_it_got_less_the_share_of_its_bias():
    model, (x, y) = build(convolutional(), bias=True), data(2, 6, 6)

    scores = score(model, [(x, y)], epsilon=0.0, heatmaps=4)

    arriving = explained(model, x, y)
    arriving.backward()
    arriving = arriving.detach()
    for number in reversed(range(len(model))):
        layer = model[number]
        if isinstance(layer, nn.Conv2d | nn.Linear):
            arriving -= (layer.bias * layer.bias.grad).sum().detach()
            assert_equal(scores.relevance[f"{number}.weight"].sum(), arriving)
        elif isinstance(layer, nn.BatchNorm2d):
            shift = layer.bias - layer.running_mean * layer.weight / (layer.running_var + layer.eps).sqrt()
            arriving -= (shift * layer.bias.grad).sum().detach()
    assert_equal(scores.heatmaps.relevance.sum() / 4, arriving)


def test_epsilon_takes_its_share_of_each_output():
    model, (x, y) = build(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), bias=False), data(5)
    epsilon = 0.2

    scores = score(model, [(x, y)], epsilon=epsilon, heatmaps=4)

    logits = model(x).detach()
    last = logits * (F.one_hot(y, 3) - logits.softmax(1)) * logits.abs() / (logits.abs() + epsilon)
    assert_equal(scores.relevance["2.weight"].sum(), last.sum() / 4)
    z = model[0](x).detach()
    hidden = z.relu() * ((last / logits) @ model[2].weight.detach()) * z.abs() / (z.abs() + epsilon)
    assert_equal(scores.relevance["0.weight"].sum(), hidden.sum() / 4)
    assert_equal(scores.heatmaps.relevance.sum() / 4, hidden.sum() / 4)


class Branches(nn.Module):
    """A sum, a concatenation and an identity around layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.around, self.wide, self.narrow = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 3), nn.Conv2d(4, 2, 3)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        x = F.relu(self.left(x)) + self.right(x)
        y = self.around(x)
        y += x
        x = torch.cat([F.max_pool2d(self.wide(y), 2), F.avg_pool2d(self.narrow(y), 2)], 1)
        return self.head(x.relu_().mean((2, 3)))


def test_branches_hold_all_relevance_together():
    model, (x, y) = build(Branches(), bias=False), data(2, 8, 8)

    scores = score(model, [(x, y)], epsilon=0.0, heatmaps=4)

    expected = explained(model, x, y).detach()
    held = {name.removesuffix(".weight"): relevance.sum() for name, relevance in scores.relevance.items()}
    for together in (["stem"], ["left", "right"], ["wide", "narrow"], ["head"]):
        assert_equal(sum(held[name] for name in together), expected)
    assert_equal(scores.heatmaps.relevance.sum() / 4, expected)
    assert (held["around"] - expected).abs() > 1e-3  # the identity around it holds the rest


def everywhere(rule):
    return LayerMapComposite([(Linear, rule)])


def first(rule):
    return SpecialFirstLayerMapComposite([(Linear, ZPlus(TINY))], [(Linear, rule)])


@pytest.mark.parametrize(
    "composite",
    [
        everywhere(ZPlus(TINY)), everywhere(AlphaBeta(2, 1, TINY)), everywhere(AlphaBeta(3, 2, TINY)),
        everywhere(Gamma(0.25, TINY)), first(Flat(TINY)), first(WSquare(TINY)), first(ZBox(-5.0, 5.0, TINY)),
    ],
    ids=["zplus", "alpha2 beta1", "alpha3 beta2", "gamma", "flat", "wsquare", "zbox"],
)  # fmt: skip
def test_other_rules_conserve_relevance_where_there_are_no_biases(composite):
    model, (x, y) = build(convolutional(), bias=False), data(2, 6, 6)

    scores = score(model, [(x, y)], composite=composite, heatmaps=4)

    expected = explained(model, x, y).detach()
    for relevance in (*scores.relevance.values(), scores.heatmaps.relevance / 4):
        torch.testing.assert_close(relevance.sum(), expected, rtol=1e-8, atol=1e-11)


class Attention(nn.Module):
    """nn.MultiheadAttention, or the same by `F.scaled_dot_product_attention`, between layers, with norms around."""

    def __init__(self, functional, residual):
        super().__init__()
        self.functional, self.residual = functional, residual
        self.stem, self.norm1, self.norm2 = nn.Linear(5, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.project, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm1(x)
        if self.functional:
            q, k, v = self.project(y).view(*y.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            y = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        else:
            y = self.attention(y, y, y, need_weights=False)[0]
        x = self.norm2(x + y if self.residual else y)
        return self.head(F.relu(x).mean(1))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("functional", [False, True])
def test_attention_with_constant_weights_conserves_relevance(functional, residual):
    model, (x, y) = build(Attention(functional, residual), bias=False), data(6, 5)

    scores = score(model, [(x, y)], epsilon=0.0, attention="cp", heatmaps=4)

    expected = explained(model, x, y).detach()
    held = {name: relevance.nansum() for name, relevance in scores.relevance.items()}
    assert_equal(scores.heatmaps.relevance.sum() / 4, expected)
    assert_equal(held["head.weight"], expected)
    assert_equal(held["stem.weight"], expected)
    if not residual:  # values hold all, queries and keys are unknown
        projections = scores.relevance["project.weight" if functional else "attention.in_proj_weight"]
        assert projections[:16].isnan().all()
        assert_equal(projections[16:].sum(), expected)
        assert_equal(held["out.weight" if functional else "attention.out_proj.weight"], expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_conserves_the_relevance_of_its_tokens(norm_first):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, tokens):
            return self.head(self.encoder(self.embed(tokens))[:, 0])

    model, y = build(Encoder(), bias=False), torch.tensor([0, 1, 2])
    tokens = torch.randint(0, 9, (3, 5))

    scores = score(model, [(tokens, y)], epsilon=0.0, attention="cp", heatmaps=3)

    expected = explained(model, tokens, y).detach()
    assert scores.heatmaps.relevance.shape == (3, 5)
    assert_equal(scores.heatmaps.relevance.sum() / 3, expected)
    assert_equal(scores.relevance["embed.weight"].nansum(), expected)
