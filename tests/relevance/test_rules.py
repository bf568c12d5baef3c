"""Every rule against zennit's heat map, and against messages written out weight by weight."""

import oracles
import pytest
import torch
from oracles import assert_close, zennit_heat_map
from torch import nn
from zennit.composites import (
    COMPOSITES,
    LayerMapComposite,
    SpecialFirstLayerMapComposite,
    layer_map_base,
)
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, WSquare, ZBox, ZPlus
from zennit.types import AvgPool, Linear

from lightning_xai_compress import score

EXACT = 1e-15  # we pool without zennit's stabiliser
STATISTICS = ("rms", "absolute", "positive")


def everywhere(rule):
    return LayerMapComposite([*layer_map_base(EXACT), (Linear, rule)])


def first_then_epsilon(rule):
    return SpecialFirstLayerMapComposite([*layer_map_base(EXACT), (Linear, Epsilon())], [(Linear, rule)])


def of_zennit(name, **settings):
    return COMPOSITES[name](layer_map=[(AvgPool, Norm(EXACT))], **settings)


def on(*, first=None, first_convolution=None, convolutions=oracles.epsilon, linear=oracles.epsilon):
    def rules(model):
        layers = {i: each for i, each in enumerate(model) if isinstance(each, nn.Linear | nn.Conv2d)}
        chosen = {i: linear if isinstance(each, nn.Linear) else convolutions for i, each in layers.items()}
        special = first or (first_convolution if isinstance(layers[0], nn.Conv2d) else None)
        return chosen if special is None else chosen | {0: special}

    return rules


def on_all(rule):
    return on(convolutions=rule, linear=rule)


def alpha3_beta2(x, w, b, r):
    return oracles.alpha_beta(x, w, b, r, 3.0, 2.0)


def gamma_tenth(x, w, b, r):
    return oracles.gamma(x, w, b, r, 0.1)


def epsilon_quarter(x, w, b, r):
    return oracles.epsilon(x, w, b, r, 0.25)


box = of_zennit("epsilon_gamma_box", low=-4.0, high=4.0)
# ours, zennit's, by hand
CASES = {
    "zplus": ("zplus", everywhere(ZPlus()), on_all(oracles.zplus)),
    "gamma": ("gamma", everywhere(Gamma()), on_all(oracles.gamma)),
    "alpha_beta": ("alpha_beta", everywhere(AlphaBeta()), on_all(oracles.alpha_beta)),
    "epsilon_plus": ("epsilon_plus", of_zennit("epsilon_plus"), on(convolutions=oracles.zplus)),
    "epsilon_alpha2_beta1": (
        "epsilon_alpha2_beta1",
        of_zennit("epsilon_alpha2_beta1"),
        on(convolutions=oracles.alpha_beta),
    ),
    "epsilon_plus_flat": (
        "epsilon_plus_flat",
        of_zennit("epsilon_plus_flat"),
        on(first=oracles.flat, convolutions=oracles.zplus),
    ),
    "epsilon_alpha2_beta1_flat": (
        "epsilon_alpha2_beta1_flat",
        of_zennit("epsilon_alpha2_beta1_flat"),
        on(first=oracles.flat, convolutions=oracles.alpha_beta),
    ),
    "EpsilonGammaBox": (box, box, on(first_convolution=oracles.zbox, convolutions=oracles.gamma)),
    "Epsilon(0.25)": (*[everywhere(Epsilon(0.25))] * 2, on_all(epsilon_quarter)),
    "Norm": (*[everywhere(Norm())] * 2, on_all(oracles.epsilon)),
    "ZPlus": (*[everywhere(ZPlus())] * 2, on_all(oracles.zplus)),
    "Gamma(0.1)": (*[everywhere(Gamma(0.1))] * 2, on_all(gamma_tenth)),
    "AlphaBeta(3, 2)": (*[everywhere(AlphaBeta(3, 2))] * 2, on_all(alpha3_beta2)),
    "ZBox": (*[first_then_epsilon(ZBox(-4.0, 4.0))] * 2, on(first=oracles.zbox)),
    "Flat": (*[first_then_epsilon(Flat())] * 2, on(first=oracles.flat)),
    "WSquare": (*[first_then_epsilon(WSquare())] * 2, on(first=oracles.wsquare)),
}


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2, padding=1, dilation=2, groups=2),
        nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    )  # fmt: skip


def fully_connected():
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


NETWORKS = {"convolutional": (convolutional, (3, 2, 4, 4)), "fully connected": (fully_connected, (3, 5))}


def build(network):
    torch.manual_seed(3)
    make, shape = NETWORKS[network]
    model = make().double()
    model[-1].bias.data.add_(20.0)  # all logits positive, so that none is left out
    return model, torch.randn(shape, dtype=torch.float64), torch.randint(0, 3, (shape[0],))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("case", CASES)
def test_heat_map_is_zennits(case, network):
    model, x, y = build(network)
    ours, zennits, _ = CASES[case]

    heat = score(model, [(x, y)], composite=ours, explain="logit", heatmaps=3).heatmaps.relevance

    assert_close(heat, zennit_heat_map(model, zennits, x, y))


@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_heat_map_is_zennits_where_inputs_have_one_sign(case, sign):
    model, x, y = build("convolutional")
    ours, zennits, _ = CASES[case]
    x = sign * x.abs()

    heat = score(model, [(x, y)], composite=ours, explain="logit", heatmaps=3).heatmaps.relevance

    assert_close(heat, zennit_heat_map(model, zennits, x, y))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("case", CASES)
def test_relevance_and_statistics_of_weights_are_those_of_messages_written_out(case, network):
    model, x, y = build(network)
    ours, zennits, rules = CASES[case]

    scores = score(model, [(x[:2], y[:2]), (x[2:], y[2:])], composite=ours, explain="logit", statistics=STATISTICS)

    messages, heat = {}, []
    for sample, label in zip(x, y, strict=True):
        of_sample, input_relevance = oracles.lrp(model, rules(model), sample, label)
        heat.append(input_relevance)
        for name, message in of_sample.items():
            messages.setdefault(name, []).append(message)
    # what the messages of a layer add up to is what zennit gives its input: this ties the loop to zennit, too
    assert_close(torch.stack(heat), zennit_heat_map(model, zennits, x, y))
    assert messages.keys() == scores.relevance.keys()
    for name, of_samples in messages.items():
        every = torch.cat(of_samples)
        assert_close(scores.relevance[name], every.sum(0) / 3)
        assert_close(scores.rms[name], (every.square().sum(0) / 3).sqrt())
        assert_close(scores.absolute[name], every.abs().sum(0) / 3)
        assert_close(scores.positive[name], every.clamp(min=0).sum(0) / 3)
