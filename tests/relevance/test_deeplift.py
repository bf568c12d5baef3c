"""DeepLIFT against captum, its sums against f(x) - f(baseline), and its statistics against a loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from captum.attr import DeepLift
from oracles import assert_close
from torch import nn

from lightning_xai_compress import RelevanceError, score

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(did not already require gradients|Setting forward, backward hooks).*"
)

TENSOR = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
BASELINES = {"zero": 0.0, "number": 0.7, "tensor": TENSOR}


def data(*shape, samples=3):
    return torch.randn(samples, *shape, dtype=torch.float64), torch.arange(samples) % 3


def lift(model):
    """Make all logits positive, so that none is left out."""
    model = model.double().eval()
    [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].bias.data.add_(20.0)
    return model


def deeplift(model, x, y, baseline, **settings):
    return score(model, [(x, y)], "deeplift", baseline=baseline, explain="logit", heatmaps=len(x), **settings)


def difference(model, x, y, baseline):
    """Mean of f(x) - f(baseline), f the true logit."""
    with torch.no_grad():
        change = model(x.clone()) - model(torch.zeros_like(x) + baseline)
    return change.gather(1, y.unsqueeze(1)).mean()


def captums(model, x, y, baseline):
    heat, delta = DeepLift(copy.deepcopy(model)).attribute(
        x.clone(), torch.zeros_like(x) + baseline, target=y, return_convergence_delta=True
    )
    assert delta.abs().max() < 1e-10  # captum's attributions are not always complete; only then are they compared
    return heat.detach()


@pytest.mark.parametrize("baseline", BASELINES.values(), ids=BASELINES)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.ELU])
def test_heat_maps_are_captums(activation, baseline):
    model = lift(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), activation(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 5), activation(),
            nn.Linear(5, 3)
        )
    )  # fmt: skip
    x, y = data(2, 4, 4)

    assert_close(deeplift(model, x, y, baseline).heatmaps.relevance, captums(model, x, y, baseline))


@pytest.mark.parametrize("baseline", [0.0, 0.7])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_heat_maps_through_max_pooling_are_captums(activation, baseline):
    model = lift(
        nn.Sequential(
            nn.Conv2d(2, 3, 3), activation(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 4), activation(),
            nn.Linear(4, 3)
        )
    )  # fmt: skip
    x, y = data(2, 4, 4)

    assert_close(deeplift(model, x, y, baseline).heatmaps.relevance, captums(model, x, y, baseline))


@pytest.mark.parametrize(
    ("x", "baseline", "expected"),
    [
        ([3.0, 1.0], [0.0, 2.0], [1.0, 0.0]),  # the maximum moves and rises from 2 to 3
        ([1.0, 0.0], [0.0, 2.0], [0.0, -1.0]),  # moves and falls from 2 to 1
        ([5.0, 1.0], [2.0, 0.0], [3.0, 0.0]),  # stays and rises
    ],
)
def test_max_pooling_gives_the_change_to_the_maximum_that_made_it(x, baseline, expected):
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.identity = nn.Linear(2, 2, bias=False)
            self.identity.weight.data = torch.eye(2)

        def forward(self, x):
            largest = F.max_pool1d(self.identity(x).unsqueeze(1), 2).flatten(1)
            return torch.cat([largest, largest], 1)

    scores = score(
        Pool(), [(torch.tensor([x]), torch.tensor([0]))], "deeplift", baseline=torch.tensor(baseline), explain="logit"
    )

    assert scores.relevance["identity.weight"].diag().tolist() == expected


ELEMENTWISE = {
    "GELU": nn.GELU(), "SiLU in place": nn.SiLU(inplace=True), "Hardswish": nn.Hardswish(), "ReLU6": nn.ReLU6(),
    "ReLU in place": nn.ReLU(inplace=True), "LeakyReLU in place": nn.LeakyReLU(0.3, inplace=True),
    "PReLU": nn.PReLU(), "ELU in place": nn.ELU(inplace=True), "SELU": nn.SELU(), "Mish": nn.Mish(),
    "Hardtanh in place": nn.Hardtanh(-0.5, 0.5, inplace=True), "RReLU": nn.RReLU(), "Softsign": nn.Softsign(),
    "Threshold": nn.Threshold(0.1, 0.4), "LogSigmoid": nn.LogSigmoid(), "Hardsigmoid": nn.Hardsigmoid(),
    "F.relu": F.relu, "F.relu by keyword": lambda x: F.relu(input=x, inplace=True), "torch.relu": torch.relu,
    "x.relu": lambda x: x.relu(), "x.relu_": lambda x: x.relu_(), "x.sigmoid_": lambda x: x.sigmoid_(),
    "x.tanh_": lambda x: x.tanh_(), "x.clamp": lambda x: x.clamp(min=0),
    "x.clamp_": lambda x: x.clamp_(min=0), "x.abs_": lambda x: x.abs_(), "torch.exp_": torch.exp_,
    "torch.clamp_min": lambda x: torch.clamp_min(x, 0),
    "x.abs": lambda x: x.abs(), "exp": torch.exp, "square": torch.square, "x ** 3": lambda x: x**3,
    "torch.pow": lambda x: torch.pow(x, 2), "log1p": lambda x: x.abs().log1p(),
    "erf": torch.erf, "sqrt": lambda x: x.abs().sqrt(), "dropout": lambda x: F.dropout(x, 0.5, False),
    "MaxPool2d": nn.MaxPool2d(2), "overlapping": nn.MaxPool2d(3, 1, 1), "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(3),
    "padding": lambda x: F.pad(x, (1, 2), value=0.3), "mean": lambda x: x.mean(3, keepdim=True),
    "concatenation": lambda x: torch.cat([x, x.relu()], 1), "sum": lambda x: x + x.sigmoid(),
    "sum in place": lambda x: x.add_(x.tanh()), "BatchNorm": nn.BatchNorm2d(3),
}  # fmt: skip


class Around(nn.Module):
    """A function between layers."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function = nn.Conv2d(2, 3, 3, padding=1), copy.deepcopy(function)
        if isinstance(function, nn.BatchNorm2d):
            self.function.running_mean.normal_()
            self.function.running_var.uniform_(0.5, 2.0)
        features = self.double().eval().features(torch.zeros(1, 2, 4, 4, dtype=torch.float64)).shape[1]
        self.second, self.head = nn.Linear(features, 4), nn.Linear(4, 3)

    def features(self, x):
        return self.function(self.first(x)).flatten(1)

    def forward(self, x):
        return self.head(torch.tanh(self.second(self.features(x))))


@pytest.mark.parametrize("baseline", [0.0, TENSOR], ids=["zero", "tensor"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_contributions_of_every_layer_sum_to_the_change_of_the_output(name, baseline):
    model, (x, y) = lift(Around(ELEMENTWISE[name])), data(2, 4, 4)

    scores = deeplift(model, x, y, baseline)

    expected = difference(model, x, y, baseline)
    assert expected.abs() > 1e-4
    assert scores.relevance.keys() == {"first.weight", "second.weight", "head.weight"}
    for relevance in scores.relevance.values():
        torch.testing.assert_close(relevance.sum(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores.heatmaps.relevance.sum() / 3, expected, rtol=1e-9, atol=1e-12)


class Residual(nn.Module):
    """A layer in two branches of a sum, a layer called twice in a row, a tied one."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.skip = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.twice, self.tied, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.tied.weight = self.twice.weight

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        x = self.skip(x) + F.gelu(self.branch(x))
        return self.head(self.tied(self.twice(self.twice(x).relu_()).sigmoid()).tanh())


def test_contributions_of_branches_sum_up_together_and_of_calls_each():
    model, (x, y) = lift(Residual()), data(4)

    scores = deeplift(model, x, y, 0.4)

    expected = difference(model, x, y, 0.4)
    branches = scores.relevance["branch.weight"].sum() + scores.relevance["skip.weight"].sum()
    for total in (branches, scores.relevance["twice.weight"].sum() / 3, scores.relevance["stem.weight"].sum()):
        torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)


def test_statistics_are_those_of_a_loop_over_samples_and_positions():
    model, (x, y) = lift(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3))), data(3, 4)

    scores = deeplift(model, x, y, -0.5, statistics=("rms", "absolute", "positive"))

    first, head = model[0], model[3]
    shares = []
    for sample, label in zip(x, y, strict=True):
        for position, token in enumerate(sample):  # multiplier: head's weight times the quotient of differences
            z, z0 = first(token).detach(), first(torch.full_like(token, -0.5)).detach()
            multiplier = head.weight.detach().view(3, 3, 5)[label, position] * (z.tanh() - z0.tanh()) / (z - z0)
            shares.append(first.weight.detach() * torch.outer(multiplier, token + 0.5))
    shares = torch.stack(shares)
    assert_close(scores.relevance["0.weight"], shares.sum(0) / 3)
    assert_close(scores.rms["0.weight"], (shares.square().sum(0) / 3).sqrt())
    assert_close(scores.absolute["0.weight"], shares.abs().sum(0) / 3)
    assert_close(scores.positive["0.weight"], shares.clamp(min=0).sum(0) / 3)


def test_an_input_that_is_its_baseline_contributes_nothing_and_divides_by_nothing():
    model, (_, y) = lift(nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))), data(4)

    scores = deeplift(model, torch.full((3, 4), 0.5, dtype=torch.float64), y, 0.5)

    assert not any(each.any() for each in scores.relevance.values())


def test_a_neuron_whose_inputs_cancel_passes_its_slope():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Sigmoid(), nn.Linear(1, 2)).double()
    model[0].weight.data.fill_(1.0)
    model[2].weight.data.fill_(8.0)
    x = torch.tensor([[3.0, -3.0]], dtype=torch.float64)

    scores = score(model, [(x, torch.tensor([0]))], "deeplift", explain="logit")

    assert scores.relevance["0.weight"].tolist() == [[6.0, -6.0]]  # 8 times the slope 1/4 times 3


def test_a_baseline_takes_the_type_of_the_input():
    model, (x, y) = lift(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))).float(), data(4)

    wide = score(model, [(x.float(), y)], "deeplift", baseline=torch.full((4,), 0.5, dtype=torch.float64))

    narrow = score(model, [(x.float(), y)], "deeplift", baseline=torch.full((4,), 0.5))
    assert torch.equal(wide.relevance["0.weight"], narrow.relevance["0.weight"])


@pytest.mark.parametrize("shape", [(7,), (5, 3, 4)])
def test_a_baseline_that_does_not_fit_the_input_is_refused(shape):
    with pytest.raises(RelevanceError, match=r"a baseline of shape .* does not broadcast to an input of .*\(3, 4\)"):
        score(nn.Linear(4, 3).double(), [data(4)], "deeplift", baseline=torch.zeros(shape))


def test_integers_have_no_baseline():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))

    with pytest.raises(RelevanceError, match="batch 0 has no floating-point input: DeepLIFT compares with a baseline"):
        score(model, [(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1]))], "deeplift")


class Turning(nn.Module):
    """Takes another way for positive inputs than for zero."""

    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.head = function, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.function(self, x, bool(x.sum() > 0))


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda m, x, up: m.head(x).tanh() if up else m.head(x), "more operations for the batch than for the baseline"),
        (lambda m, x, up: m.head(x) if up else m.head(x).tanh(), "fewer operations for the batch than for the baseli"),
        (lambda m, x, up: m.head(x.relu() if up else x.tanh()), "another path for the batch than for the baseline"),
        (lambda m, x, up: m.head(m.first(x if up else x[:1])), "another path for the batch than for the baseline"),
    ],
)
def test_another_path_for_the_baseline_is_refused(function, text):
    x, y = data(4)

    with pytest.raises(RelevanceError, match=text):
        score(Turning(function).double(), [(x.abs(), y)], "deeplift")


def test_a_power_of_a_number_passes_its_ordinary_gradient():
    model, (x, y) = lift(Turning(lambda m, x, up: m.head(torch.pow(2.0, m.first(x))))), data(4)

    scores = score(model, [(x, y)], "deeplift", explain="logit", baseline=0.3)

    z = model.first(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.head(2.0**z).gather(1, y.unsqueeze(1)).sum(), z)
    assert_close(scores.relevance["first.weight"], model.first.weight.detach() * (gradient.T @ (x - 0.3)) / 3)


def test_a_model_that_cannot_track_its_input_is_run_again_from_the_start():
    class Numpy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            hidden = self.first(x).relu()
            assert len(x.numpy())  # fails where x needs a gradient, with two operations done
            return self.head(hidden)

    model, (x, y) = lift(Numpy()), data(4)

    scores = score(model, [(x, y)], "deeplift", explain="logit")

    torch.testing.assert_close(
        scores.relevance["first.weight"].sum(), difference(model, x, y, 0.0), rtol=1e-9, atol=1e-12
    )
