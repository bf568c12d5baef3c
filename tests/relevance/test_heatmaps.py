"""Heat maps against captum and zennit, and their pictures."""

import copy

import pytest
import torch
from captum.attr import LRP, InputXGradient, LayerGradientXActivation
from captum.attr._utils.custom_modules import Addition_Module
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule
from oracles import assert_close, zennit_heat_map
from PIL import Image
from torch import nn
from zennit.composites import LayerMapComposite, NameMapComposite, SpecialFirstLayerMapComposite, layer_map_base
from zennit.rules import Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus
from zennit.types import Linear

from lightning_xai_compress import RelevanceError, save_heatmaps, score
from lightning_xai_compress.plan import HeatMaps

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")


def data(*shape, samples=3):
    return torch.randn(samples, *shape, dtype=torch.float64), torch.arange(samples) % 3


class Residual(nn.Module):
    """What captum's LRP can do."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.act1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.second, self.add, self.act2 = nn.Conv2d(4, 4, 3, padding=1), Addition_Module(), nn.ReLU()
        self.maximum, self.mean = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.hidden, self.act3, self.drop, self.head = nn.Linear(4, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.double()
        self.head.bias.data.add_(20.0)

    def forward(self, x):
        x = self.act1(self.norm(self.first(x)))
        x = self.act2(self.add(x, self.second(x)))
        x = self.mean(self.maximum(x)).flatten(1)
        return self.head(self.drop(self.act3(self.hidden(x))))


@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.5])
def test_epsilon_is_that_of_captum(epsilon):
    model, (x, y) = Residual().eval(), data(2, 4, 4)

    heat = score(model, [(x, y)], epsilon=epsilon, explain="logit", heatmaps=3).heatmaps.relevance

    for layer in model.children():
        if not isinstance(layer, nn.ReLU | nn.Tanh | nn.Dropout):
            layer.rule = EpsilonRule(epsilon if isinstance(layer, nn.Linear | nn.Conv2d) else 1e-15)
    assert_close(heat, LRP(model).attribute(x, target=y).detach())


@pytest.mark.parametrize(
    ("captums", "zennits"), [(GammaRule(0.3), Gamma(0.3, stabilizer=1e-13)), (Alpha1_Beta0_Rule(), ZPlus(1e-13))]
)
def test_gamma_and_zplus_are_those_of_captum_for_positive_inputs_without_biases(captums, zennits):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2, bias=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)
    ).double()  # fmt: skip
    for i in (3, 6):  # none is dead
        model[i].weight.data.add_(0.2)
    model[-1].weight.data.abs_()
    x, y = data(2, 4, 4)
    x = x.abs()

    scores = score(model, [(x, y)], composite=LayerMapComposite([(Linear, zennits)]), explain="logit", heatmaps=3)

    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.rule = copy.copy(captums)
        elif not isinstance(layer, nn.ReLU):
            layer.rule = EpsilonRule()
        if hasattr(layer, "rule"):
            layer.rule.STABILITY_FACTOR = 1e-13
    assert scores.left_out == 0
    assert_close(scores.heatmaps.relevance, LRP(model).attribute(x, target=y).detach())


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_gradient_criteria_show_input_times_gradient(criterion):
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    model[-1].bias.data.add_(20.0)
    x, y = data(4)

    heat = score(model, [(x, y)], criterion, explain="logit", heatmaps=3).heatmaps.relevance

    assert_close(heat, InputXGradient(model).attribute(x, target=y).detach())


def first_layer(rule):
    return SpecialFirstLayerMapComposite([*layer_map_base(1e-15), (Linear, Epsilon())], [(Linear, rule)])


# what stands between the input and the layer that gives relevance to zeros
IN_FRONT = {
    "nothing": nn.Sequential(nn.Linear(4, 5)),
    "flattening": nn.Sequential(nn.Flatten(), nn.Linear(32, 5)),
    "circular padding": nn.Sequential(nn.Conv2d(2, 5, 3, padding=1, padding_mode="circular")),
    "reflecting padding": nn.Sequential(nn.Conv2d(2, 5, 3, padding=1, padding_mode="reflect")),
    "uneven padding": nn.Sequential(nn.ZeroPad2d((2, 0, 1, 0)), nn.Conv2d(2, 5, 3)),
}


@pytest.mark.parametrize("name", IN_FRONT)
@pytest.mark.parametrize("rule", [Flat(), WSquare(), ZBox(-5.0, 5.0)], ids=["Flat", "WSquare", "ZBox"])
def test_relevance_of_zeros_finds_its_way_to_the_input(name, rule):
    model = nn.Sequential(*copy.deepcopy(IN_FRONT[name]), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = data(2, 4, 4)
    x[:, :, 1] = 0
    model(x)
    model[-1].bias.data.add_(20.0)

    heat = score(model, [(x, y)], composite=first_layer(rule), explain="logit", heatmaps=3).heatmaps.relevance

    assert heat[:, :, 1].abs().max() > 0
    assert_close(heat, zennit_heat_map(model, first_layer(rule), x, y))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_relevance_of_zeros_passes_transposition_inside_the_model_but_not_normalization(scale):
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)).double()
            self.net[-1].bias.data.add_(20.0)

        def forward(self, x):
            return self.net((x if scale == 1 else x / scale).transpose(1, 2).flatten(1))

    model, (x, y) = Turning(), data(4, 4)

    if scale != 1:
        with pytest.raises(RelevanceError, match=r"only stand at the input of the model \(normalized outside of it\)"):
            score(model, [(x, y)], composite=first_layer(Flat()), explain="logit", heatmaps=3)
        return
    heat = score(model, [(x, y)], composite=first_layer(Flat()), explain="logit", heatmaps=3).heatmaps.relevance

    seen = x.transpose(1, 2).flatten(1)
    assert_close(heat, zennit_heat_map(model.net, first_layer(Flat()), seen, y).view(3, 4, 4).transpose(1, 2))


def test_an_input_collects_relevance_from_layers_of_either_kind_of_rule():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.plain, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(10, 3)

        def forward(self, x):
            return self.head(torch.cat([self.flat(x), self.plain(x)], 1))

    model, (x, y) = Fork().double(), data(4)
    model.head.bias.data.add_(20.0)
    composite = NameMapComposite([(["flat"], Flat(0.0))])

    maps = score(model, [(x, y)], composite=composite, explain="logit", epsilon=0.0, heatmaps=3).heatmaps

    c = model.head.weight.detach()[y]
    evenly = (c[:, :5] * model.flat(x).detach()).sum(1, keepdim=True) / 4
    assert_close(maps.relevance, evenly + x * (c[:, 5:] @ model.plain.weight.detach()))


def test_a_rule_for_the_input_in_the_middle_is_refused_where_the_relevance_below_is_asked_for():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    composite, batch = NameMapComposite([(["2"], ZBox(0.0, 9.0))]), data(4)

    assert [*score(model, [batch], composite=composite, layers=["2.weight"]).relevance] == ["2.weight"]
    for settings in ({"layers": ["2.weight"], "heatmaps": 1}, {"layers": ["0.weight", "2.weight"]}):
        with pytest.raises(RelevanceError, match=r"rule ZBox at 2 .* it can only stand at the input of the model"):
            score(model, [batch], composite=composite, **settings)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.double()
        self.head.bias.data.add_(20.0)

    def forward(self, tokens):
        return self.head(self.hidden(self.embed(tokens)).relu().mean(1))


def test_tokens_get_the_relevance_of_their_embeddings():
    model, y = Tokens(), torch.tensor([0, 1, 2])
    tokens = torch.tensor([[1, 2, 3, 3], [8, 0, 1, 4], [5, 6, 7, 2]])

    maps = score(model, [(tokens, y)], explain="logit", epsilon=0.0, heatmaps=2).heatmaps

    expected = LayerGradientXActivation(model, model.embed).attribute(tokens, target=y).sum(-1).detach()
    assert torch.equal(maps.inputs, tokens[:2])
    assert_close(maps.relevance, expected[:2])


@pytest.mark.parametrize(("wanted", "found"), [(2, 2), (3, 3), (5, 5), (99, 7)])
@pytest.mark.parametrize("criterion", ["lrp", "deeplift"])
def test_heat_maps_come_from_the_first_samples_over_batches(wanted, found, criterion):
    model, (x, y) = Residual(), data(2, 4, 4, samples=7)

    maps = score(model, [(x[:3], y[:3]), (x[3:], y[3:])], criterion, heatmaps=wanted).heatmaps

    whole = score(model, [(x, y)], criterion, heatmaps=7).heatmaps
    assert torch.equal(maps.inputs, x[:found])
    assert_close(maps.relevance, whole.relevance[:found])


def test_no_heat_maps_unless_asked_for():
    assert score(Residual(), [data(2, 4, 4)]).heatmaps is None
    with pytest.raises(ValueError, match="heatmaps must be >= 0, got -1"):
        score(Residual(), [data(2, 4, 4)], heatmaps=-1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width", "factor"), [(8, 6, 12), (40, 50, 1)])
def test_pictures_show_inputs_above_relevance_in_red_and_blue(tmp_path, channels, height, width, factor):
    inputs = torch.rand(2, channels, height, width)
    inputs[0, :, 0, 0], inputs[0, :, 1, 1] = -1.0, 2.0  # darkest and brightest
    relevance = torch.zeros(2, channels, height, width)
    relevance[0, 0, 2, 3], relevance[1, 0, 4, 5] = 3.0, -0.01  # each sample has a scale of its own

    save_heatmaps(HeatMaps(inputs, relevance), tmp_path / "relevance.png")

    with Image.open(tmp_path / "relevance.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert picture.size == (2 * width * factor, 2 * height * factor)

        def pixel(row, column, *, sample=0, heat=False):
            return picture.getpixel(((sample * width + column) * factor, (heat * height + row) * factor))

        assert pixel(0, 0) == (0, 0, 0)
        assert pixel(1, 1) == (255, 255, 255)
        assert min(pixel(0, 0, heat=True)) >= 253  # no relevance is white
        red, green, blue = pixel(2, 3, heat=True)
        assert red > 250
        assert max(green, blue) < 5
        red, green, blue = pixel(4, 5, sample=1, heat=True)
        assert blue > 250
        assert max(red, green) < 5


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 4), (2, 2, 4, 4), (2, 3, 4, 4, 4)])
def test_what_is_no_image_is_not_drawn(tmp_path, shape):
    maps = HeatMaps(torch.rand(shape), torch.rand(shape))

    with pytest.raises(RelevanceError, match=r"inputs of shape .* are no images: expected \[channels, height, width\]"):
        save_heatmaps(maps, tmp_path / "relevance.png")
