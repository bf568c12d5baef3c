"""Which rule runs where: names, zennit composites of the user's own, BatchNorm merged; and what is refused."""

import copy

import oracles
import pytest
import torch
from oracles import assert_close, zennit_heat_map
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from zennit.canonizers import NamedMergeBatchNorm, SequentialMergeBatchNorm
from zennit.composites import (
    COMPOSITES,
    EpsilonPlus,
    LayerMapComposite,
    NameLayerMapComposite,
    NameMapComposite,
    layer_map_base,
)
from zennit.core import BasicHook
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, Pass, WSquare, ZBox, ZPlus
from zennit.types import Linear

from lightning_xai_compress import RelevanceError, score

RULES = {
    "zplus": (ZPlus(), oracles.zplus),
    "gamma": (Gamma(), oracles.gamma),
    "alpha_beta": (AlphaBeta(), oracles.alpha_beta),
    "Epsilon": (Epsilon(0.25), lambda x, w, b, r: oracles.epsilon(x, w, b, r, 0.25)),
}


def composite_of(rule):
    return LayerMapComposite([*layer_map_base(1e-15), (Linear, rule)])


def normed(model):
    """Norms in evaluation mode with values of their own, and eps = 0, which zennit leaves in."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.eps = 0.0
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
            if layer.affine:
                nn.init.uniform_(layer.weight, -1.5, 1.5)
                nn.init.normal_(layer.bias)
    return lift(model.double().eval())


def lift(model):
    [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].bias.data.add_(20.0)
    return model.double()


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 2, groups=2),
        nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
    )  # fmt: skip


def data(*shape):
    return torch.randn(3, *shape, dtype=torch.float64), torch.tensor([0, 2, 1])


@pytest.mark.parametrize("name", RULES)
def test_a_following_norm_is_merged_as_zennits_canonizer_does(name):
    model, (x, y) = normed(convolutional()), data(2, 4, 4)
    rule, hand = RULES[name]

    scores = score(model, [(x, y)], composite=composite_of(rule), explain="logit", heatmaps=3)

    assert_close(
        scores.heatmaps.relevance, zennit_heat_map(model, composite_of(rule), x, y, SequentialMergeBatchNorm())
    )
    merged, rules = merged_by_hand(model), dict.fromkeys((0, 3, 7, 10), hand)
    messages = [oracles.lrp(merged, rules, sample, label)[0] for sample, label in zip(x, y, strict=True)]
    for weight in scores.relevance:
        assert_close(scores.relevance[weight], torch.cat([each[weight] for each in messages]).sum(0) / 3)


def merged_by_hand(model):
    merged = copy.deepcopy(model)
    for i, norm in enumerate(model):
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            fuse = fuse_linear_bn_eval if isinstance(model[i - 1], nn.Linear) else fuse_conv_bn_eval
            merged[i - 1], merged[i] = fuse(model[i - 1], norm), nn.Identity()
    merged[2].inplace = False
    return merged


def test_plain_epsilon_needs_no_merging():
    model, (x, y) = normed(convolutional()), data(2, 4, 4)

    heat = score(model, [(x, y)], epsilon=0.0, explain="logit", heatmaps=3).heatmaps.relevance

    assert_close(heat, zennit_heat_map(model, composite_of(Epsilon(1e-15)), x, y, SequentialMergeBatchNorm()))


class OutOfOrder(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm2, self.norm1 = nn.BatchNorm2d(3), nn.BatchNorm2d(4)
        self.head, self.act = nn.Linear(12, 3), nn.ReLU()
        self.second, self.first = nn.Conv2d(4, 3, 3), nn.Conv2d(2, 4, 3)

    def forward(self, x):
        x = self.act(self.norm1(self.first(x)))
        return self.head(self.norm2(self.second(x)).relu().flatten(1))


@pytest.mark.parametrize("name", RULES)
def test_a_norm_registered_out_of_order_is_merged_with_the_layer_that_ran_before_it(name):
    model, (x, y) = normed(OutOfOrder()), data(2, 6, 6)
    rule, _ = RULES[name]

    heat = score(model, [(x, y)], composite=composite_of(rule), explain="logit", heatmaps=3).heatmaps.relevance

    names = NamedMergeBatchNorm([(["first"], "norm1"), (["second"], "norm2")])
    assert_close(heat, zennit_heat_map(model, composite_of(rule), x, y, names))


@pytest.mark.parametrize("name", ["zplus", "gamma", "alpha_beta", "epsilon_plus", "epsilon_plus_flat"])
def test_a_norm_without_parameters_of_its_own_is_merged_after_a_transposed_convolution(name):
    model = normed(
        nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3, stride=2), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(),
            nn.Linear(196, 3)
        )
    )  # fmt: skip
    x, y = data(2, 3, 3)
    merged = copy.deepcopy(model)
    merged[0], merged[1] = fuse_conv_bn_eval(model[0], model[1], transpose=True), nn.Identity()

    scores = score(model, [(x, y)], composite=name, explain="logit", statistics=("absolute",), heatmaps=3)

    expected = score(merged, [(x, y)], composite=name, explain="logit", statistics=("absolute",), heatmaps=3)
    assert_close(scores.relevance["0.weight"], expected.relevance["0.weight"])
    assert_close(scores.absolute["0.weight"], expected.absolute["0.weight"])
    assert_close(scores.heatmaps.relevance, expected.heatmaps.relevance)


@pytest.mark.parametrize("composite", ["epsilon", "zplus", "alpha_beta"])
@pytest.mark.parametrize("change", ["ReLU", "sum"])
def test_a_norm_after_something_in_place_is_not_merged_with_the_layer_before(composite, change):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(32, 3)
            self.inplace = False

        def forward(self, x):
            y = self.first(x)
            if change == "ReLU":
                y = nn.functional.relu(y, inplace=self.inplace)
            elif self.inplace:
                y += x
            else:
                y = y + x
            return self.head(self.norm(y).flatten(1))

    model, (x, y) = normed(Changed()), data(2, 4, 4)
    expected = score(model, [(x, y)], composite=composite, explain="logit")

    model.inplace = True
    scores = score(model, [(x, y)], composite=composite, explain="logit")

    for name in expected.score:
        assert_close(scores.relevance[name], expected.relevance[name])
        assert_close(scores.score[name], expected.score[name])


def plain():
    return lift(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
    )


def test_composites_of_the_users_own_choose_layers_by_name_and_type():
    def mine():
        by_name = [(["0"], ZBox(-4.0, 4.0)), (["5"], Gamma(0.5))]
        return NameLayerMapComposite(by_name, [*layer_map_base(1e-15), (nn.Linear, AlphaBeta(2, 1))])

    model, (x, y) = plain(), data(2, 4, 4)

    heat = score(model, [(x, y)], composite=mine(), explain="logit", heatmaps=3).heatmaps.relevance

    assert_close(heat, zennit_heat_map(model, mine(), x, y))


def test_settings_of_a_composite_are_kept():
    def mine():
        return EpsilonPlus(epsilon=0.5, stabilizer=0.1, zero_params="bias")

    model, (x, y) = plain(), data(2, 4, 4)

    heat = score(model, [(x, y)], composite=mine(), explain="logit", heatmaps=3).heatmaps.relevance

    assert_close(heat, zennit_heat_map(model, mine(), x, y))


def test_a_layer_without_a_rule_takes_epsilon():
    model, (x, y) = plain(), data(2, 4, 4)

    some = score(model, [(x, y)], composite=NameMapComposite([(["0"], ZPlus())]), explain="logit", epsilon=0.5)

    every = NameMapComposite([(["0"], ZPlus()), (["3", "5"], Epsilon(0.5))])
    expected = score(model, [(x, y)], composite=every, explain="logit")
    for name in expected.relevance:
        assert_close(some.relevance[name], expected.relevance[name])


@pytest.mark.parametrize(
    ("composite", "text"),
    [
        (NameMapComposite([(["3"], Pass())]), "rule Pass at 3 has no per-weight form: .* Rules that do: Epsilon"),
        (COMPOSITES["deconvnet"](), r"rule ReLUDeconvNet at 1 \(ReLU\) has no per-weight form"),
        (COMPOSITES["guided_backprop"](), r"rule ReLUGuidedBackprop at 1 \(ReLU\) has no per-weight form"),
        (COMPOSITES["beta_smooth"](), r"rule ReLUBetaSmooth at 1 \(ReLU\) has no per-weight form"),
        (NameMapComposite([(["1"], ZPlus())]), r"rule ZPlus at 1 \(ReLU\) has no per-weight form: rules other than"),
        (
            NameMapComposite([(["3"], BasicHook(reducer=lambda x, g: (x[0] * g[0]).abs()))]),
            "rule BasicHook at 3 has no per-weight form: its reducer is not a sum of inputs times gradients",
        ),
        (
            NameMapComposite([(["0"], BasicHook(reducer=lambda x, g: g[0]))]),
            "rule BasicHook at 0 has no per-weight form: its reducer leaves the inputs out",
        ),
        *[
            (NameMapComposite([(["2"], rule)]), rf"rule {type(rule).__name__} at 2 \(Flatten\) has no per-weight form")
            for rule in (Pass(), Norm())
        ],
        (
            NameMapComposite([(["3"], BasicHook(output_modifiers=[lambda z: 2 * z]))]),
            "rule BasicHook at 3: rules that modify outputs are not supported",
        ),
        *[
            (NameMapComposite([(["3"], rule)]), f"rule {type(rule).__name__} at 3 gives relevance to inputs that are")
            for rule in (ZBox(0.0, 1.0), Flat(), WSquare())
        ],
    ],
)
def test_rules_without_a_form_for_the_layer_are_refused_by_name(composite, text):
    with pytest.raises(RelevanceError, match=text):
        score(plain(), [data(2, 4, 4)], composite=composite, heatmaps=1)


def test_calls_without_a_batch_follow_the_rule():
    class OneByOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, (2, 3), padding="same"), nn.Linear(64, 3)

        def forward(self, x):
            return self.head(torch.stack([self.conv(each) for each in x]).relu().flatten(1))

    model, (x, y) = lift(OneByOne()), data(2, 4, 4)
    batched = nn.Sequential(model.conv, nn.ReLU(), nn.Flatten(), model.head)
    settings = {"explain": "logit", "statistics": ("rms", "absolute"), "heatmaps": 3}

    scores = score(model, [(x, y)], composite="alpha_beta", **settings)

    expected = score(batched, [(x, y)], composite="alpha_beta", **settings)
    for statistic in ("relevance", "rms", "absolute"):
        assert_close(getattr(scores, statistic)["conv.weight"], getattr(expected, statistic)["0.weight"])
    assert_close(scores.heatmaps.relevance, expected.heatmaps.relevance)


@pytest.mark.parametrize(
    ("composite", "text"),
    [
        ("zpuls", "composite must be one of epsilon, zplus, .* or a zennit Composite, got 'zpuls'"),
        (ZPlus(), "composite must be one of .* got <zennit.rules.ZPlus"),
        (EpsilonPlus, "composite must be one of .* got <class"),
        ("epsilon_gamma_box", r"needs the range of the input: pass zennit.composites.EpsilonGammaBox\(low=..., high"),
    ],
)
def test_unknown_composites_are_refused(composite, text):
    with pytest.raises(ValueError, match=text):
        score(plain(), [data(2, 4, 4)], composite=composite)


def halves():
    """Epsilon cut into two parts that give to the same weights."""
    return BasicHook(
        input_modifiers=[lambda x: x] * 2,
        param_modifiers=[lambda w, _: 0.5 * w] * 2,
        output_modifiers=[lambda z: z] * 2,
        gradient_mapper=lambda r, z: [r / (z[0] + z[1])] * 2,
        reducer=lambda x, g: x[0] * g[0] + x[1] * g[1],
    )


def test_a_rule_whose_parts_overlap_has_its_square():
    model, (x, y) = plain(), data(2, 4, 4)

    scores = score(model, [(x, y)], composite=NameMapComposite([(["3"], halves())]), explain="logit")

    expected = score(model, [(x, y)], composite=NameMapComposite([(["3"], Epsilon(0.0))]), explain="logit")
    assert_close(scores.relevance["3.weight"], expected.relevance["3.weight"])
    assert_close(scores.rms["3.weight"], expected.rms["3.weight"])


@pytest.mark.parametrize(
    ("composite", "text"),
    [
        (NameMapComposite([(["3"], halves())]), "rule BasicHook at 3, for its parts overlap: leave 'absolute' and"),
        (NameMapComposite([(["0"], ZBox(-0.1, 0.1))]), "rule ZBox at 0, for inputs lie outside of its box: leave"),
    ],
)
@pytest.mark.parametrize("statistic", ["absolute", "positive"])
def test_statistics_without_a_closed_form_are_refused(composite, text, statistic):
    with pytest.raises(RelevanceError, match=text):
        score(plain(), [data(2, 4, 4)], composite=composite, statistics=(statistic,))
