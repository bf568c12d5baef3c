"""The engine against gradient x weight, against zennit, and against slow plain loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zennit.composites import LayerMapComposite, layer_map_base
from zennit.rules import Epsilon

from lightning_xai_compress import score

from nets import Net, batch, build, lift


def test_epsilon_zero_is_gradient_times_weight_of_the_true_logit():
    model, (x, y) = build(Net), batch(8, 2, 6, 6)

    scores = score(lift(model), [(x, y)], explain="logit", epsilon=0.0)

    model.eval()
    model(x).gather(1, y.unsqueeze(1)).sum().backward()
    for name, relevance in scores.relevance.items():
        parameter = dict(model.named_parameters())[name]
        torch.testing.assert_close(relevance, parameter.grad * parameter.detach() / 8, rtol=1e-9, atol=1e-12)


def test_margin_is_minus_the_gradient_of_cross_entropy_times_weight():
    model, (x, y) = build(Net), batch(8, 2, 6, 6)

    scores = score(model, [(x, y)], explain="margin", epsilon=0.0)

    model.eval()
    (-F.cross_entropy(model(x), y, reduction="sum")).backward()
    for name, relevance in scores.relevance.items():
        parameter = dict(model.named_parameters())[name]
        torch.testing.assert_close(relevance, parameter.grad * parameter.detach() / 8, rtol=1e-9, atol=1e-12)


def zennit_heat_map(model, x, y, epsilon):
    composite = LayerMapComposite([*layer_map_base(1e-12), ((nn.Conv2d, nn.Linear), Epsilon(epsilon=epsilon))])
    x = x.clone().requires_grad_()
    with composite.context(model) as modified:
        output = modified(x)
        start = torch.zeros_like(output).scatter(1, y.unsqueeze(1), output.detach().gather(1, y.unsqueeze(1)))
        (heat,) = torch.autograd.grad(output, x, start)
    return heat


@pytest.mark.parametrize("epsilon", [1e-6, 0.25])
def test_weights_of_an_input_carry_the_relevance_that_zennit_gives_the_input(epsilon):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.LeakyReLU(), nn.Linear(5, 3)).double()
    x, y = batch(7, 6, classes=3)

    scores = score(lift(model), [(x, y)], explain="logit", epsilon=epsilon)

    heat = zennit_heat_map(model, x, y, epsilon)
    torch.testing.assert_close(scores.relevance["0.weight"].sum(0), heat.sum(0) / 7, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("epsilon", [1e-6, 0.25])
def test_convolutions_carry_the_relevance_that_zennit_gives_each_channel(epsilon):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(5, 3)
    ).double()  # fmt: skip
    x, y = batch(7, 3, 6, 6, classes=3)

    scores = score(lift(model), [(x, y)], explain="logit", epsilon=epsilon)

    heat = zennit_heat_map(model, x, y, epsilon)
    torch.testing.assert_close(
        scores.relevance["0.weight"].sum((0, 2, 3)), heat.sum((0, 2, 3)) / 7, rtol=1e-7, atol=1e-12
    )


def test_epsilon_matches_the_definition_written_out():
    """R_ij = x_i w_ij R_j / (z_j + eps sign z_j), Bach et al. 2015 eq. 58, for one hidden layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x, y = batch(5, 3, classes=2)
    epsilon = 0.1
    scores = score(lift(model), [(x, y)], explain="logit", epsilon=epsilon)

    w1, b1, w2, b2 = (parameter.detach() for parameter in model.parameters())
    expected1, expected2 = torch.zeros_like(w1), torch.zeros_like(w2)
    for sample, label in zip(x, y, strict=True):
        z1 = w1 @ sample + b1
        hidden = z1.clamp(min=0)
        z2 = w2 @ hidden + b2
        relevance = torch.zeros(2, dtype=torch.float64)
        relevance[label] = z2[label]
        messages = w2 * hidden * (relevance / (z2 + epsilon * z2.sign())).unsqueeze(1)
        expected2 += messages / 5
        expected1 += w1 * sample * (messages.sum(0) / (z1 + epsilon * z1.sign())).unsqueeze(1) / 5
    torch.testing.assert_close(scores.relevance["2.weight"], expected2, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores.relevance["0.weight"], expected1, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), (3, 2, 9)),
        (lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding="same"), (3, 4, 6, 6)),
        (lambda: nn.Conv2d(2, 4, (2, 4), padding="same", padding_mode="circular"), (3, 2, 6, 6)),
        (lambda: nn.Conv2d(2, 4, (2, 4), padding="same"), (3, 2, 6, 6)),
        (lambda: nn.Conv2d(2, 4, 3, padding="valid"), (3, 2, 6, 6)),
        (lambda: nn.Conv3d(1, 4, 2, stride=2), (3, 1, 4, 4, 4)),
    ],
)
def test_sensitivity_is_the_sum_of_squares_over_samples_and_positions(layer, shape):
    torch.manual_seed(0)
    conv = layer().double()
    model = nn.Sequential(conv, nn.Flatten(), nn.ReLU(), nn.LazyLinear(3, dtype=torch.float64))
    x, y = batch(*shape, classes=3)
    model(x)

    scores = score(lift(model), [(x, y)], explain="logit", epsilon=0.0)

    expected = torch.zeros_like(conv.weight)
    for sample, label in zip(x, y, strict=True):
        z = conv(sample.unsqueeze(0)).detach().requires_grad_()
        (c,) = torch.autograd.grad(model[1:](z)[0, label], z)
        for position in range(z[0, 0].numel()):
            single = torch.zeros_like(c).flatten(2)
            single[:, :, position] = c.flatten(2)[:, :, position]
            (share,) = torch.autograd.grad(conv(sample.unsqueeze(0)), conv.weight, single.view_as(c))
            expected += share.square() / 3
    torch.testing.assert_close(scores.sensitivity["0.weight"], expected, rtol=1e-9, atol=1e-14)


def test_score_is_rms_relevance_times_weight_with_the_norm_folded_in():
    model, (x, y) = build(Net), batch(8, 2, 6, 6)

    scores = score(model, [(x, y)])

    fold = (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).abs().view(-1, 1, 1, 1)
    weight = model.first.weight.detach()
    rms = weight.abs() * scores.sensitivity["first.weight"].sqrt()
    torch.testing.assert_close(scores.score["first.weight"], rms * (weight.abs() * fold.detach()))
    torch.testing.assert_close(
        scores.score["head.weight"],
        model.head.weight.detach().square() * scores.sensitivity["head.weight"].sqrt(),
    )


def test_a_norm_over_another_axis_than_the_rows_of_the_weight_is_not_folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(21, 3)).double()
    x, y = batch(6, 3, 5, classes=3)

    scores = score(model, [(x, y)])

    weight = model[0].weight.detach()
    torch.testing.assert_close(scores.score["0.weight"], weight.square() * scores.sensitivity["0.weight"].sqrt())


def test_scale_of_a_weight_before_batchnorm_does_not_change_its_score():
    model, (x, y) = build(Net), batch(8, 2, 6, 6)
    before = score(model, [(x, y)], epsilon=0.0)

    with torch.no_grad():
        for tensor in (model.first.weight, model.first.bias, model.norm.running_mean):
            tensor.mul_(10)
        model.norm.running_var.mul_(100)
    model.norm.eps *= 100
    after = score(model, [(x, y)], epsilon=0.0)

    for name in before.score:
        torch.testing.assert_close(after.score[name], before.score[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    "function",
    [F.gelu, F.silu, F.hardswish, F.relu6, F.mish, F.elu, torch.tanh, nn.ReLU6(inplace=True), nn.Tanh(), nn.ELU(0.5)],
)
def test_smooth_activations_pass_the_secant(function):
    torch.manual_seed(0)

    class Smooth(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.second(function(self.first(x)))

    model = Smooth().double()
    x, y = batch(5, 3, classes=2)
    x = 4 * x
    scores = score(lift(model), [(x, y)], explain="logit", epsilon=0.0)

    z = model.first(x).detach()
    c = model.second.weight.detach()[y] * function(z.clone()) / z
    torch.testing.assert_close(
        scores.relevance["first.weight"], model.first.weight.detach() * (c.T @ x) / 5, rtol=1e-9, atol=1e-12
    )


def test_tied_and_reused_weights_add_up():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(self.a(self.b(self.a(x).relu()).relu()).relu())

    model = Twice().double()
    x, y = batch(6, 4, classes=3)
    scores = score(lift(model), [(x, y)], explain="logit", epsilon=0.0)

    model(x).gather(1, y.unsqueeze(1)).sum().backward()
    assert set(scores.score) == {"a.weight", "head.weight"}
    torch.testing.assert_close(scores.relevance["a.weight"], model.a.weight.grad * model.a.weight.detach() / 6)
