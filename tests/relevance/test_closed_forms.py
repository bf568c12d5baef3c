"""Statistics against loops over samples, positions and calls; their errors; their sums over batches and processes."""

import pytest
import torch
from oracles import assert_close
from torch import nn

from lightning_xai_compress import RelevanceError, score
from lightning_xai_compress.plan import ScoreMap
from lightning_xai_compress.relevance import relevance_sums

STATISTICS = ("rms", "absolute", "positive")
EPSILON = 0.3
LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), (2, 9)),
    "Conv1d, dilated": (lambda: nn.Conv1d(2, 4, 3, dilation=2, padding=3), (2, 7)),
    "Conv2d, grouped": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2, bias=False), (4, 4, 4)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1, stride=2), (3, 5, 5)),
    "Conv2d, valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 4, 4)),
    "Conv2d, same": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 2)), (2, 5, 5)),
    **{
        f"Conv2d, {mode}": (lambda mode=mode: nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), (2, 4, 4))
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "Conv2d, same and circular": (
        lambda: nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="circular"),
        (2, 4, 4),
    ),
    "Conv3d": (lambda: nn.Conv3d(1, 3, 2, stride=(1, 2, 1), padding=(0, 1, 0)), (1, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, output_padding=1), (4, 2, 2)),
    "ConvTranspose2d, dilated": (lambda: nn.ConvTranspose2d(2, 3, 2, dilation=2, padding=1), (2, 3, 3)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(1, 2, 2), (1, 2, 2, 2)),
    "Linear": (lambda: nn.Linear(5, 4), (5,)),
    "Linear on tokens": (lambda: nn.Linear(4, 3), (6, 4)),
    "Linear on a grid of tokens": (lambda: nn.Linear(4, 3, bias=False), (2, 3, 4)),
}


def data(*shape, samples=3):
    return torch.randn(samples, *shape, dtype=torch.float64), torch.arange(samples) % 3


def by_position(z, c, linear):
    """c of one position at a time."""
    axis = -1 if linear else 1
    flat = c.movedim(axis, -1).reshape(-1, z.shape[axis])
    for position in range(len(flat)):
        single = torch.zeros_like(flat)
        single[position] = flat[position]
        yield single.view(c.movedim(axis, -1).shape).movedim(-1, axis)


def loop(shares, samples):
    shares = torch.stack(shares)
    return {
        "relevance": shares.sum(0) / samples,
        "rms": (shares.square().sum(0) / samples).sqrt(),
        "absolute": shares.abs().sum(0) / samples,
        "positive": shares.clamp(min=0).sum(0) / samples,
    }


@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_those_of_a_loop_over_samples_and_positions(name):
    make, shape = LAYERS[name]
    layer = make().double()
    x, y = data(*shape)
    head = nn.Linear(layer(x).flatten(1).shape[1], 3).double()
    head.bias.data.add_(20.0)
    model = nn.Sequential(layer, nn.LeakyReLU(0.2), nn.Flatten(), head)

    scores = score(model, [(x[:2], y[:2]), (x[2:], y[2:])], explain="logit", epsilon=EPSILON, statistics=STATISTICS)

    shares = []
    for sample, label in zip(x, y, strict=True):
        z = layer(sample.unsqueeze(0)).detach().requires_grad_()
        logit = model[1:](z)[0, label]
        (c,) = torch.autograd.grad(logit, z)
        c = c * logit.detach() / (logit.detach() + EPSILON) * z.detach().abs() / (z.detach().abs() + EPSILON)
        for single in by_position(z, c, isinstance(layer, nn.Linear)):
            (share,) = torch.autograd.grad(layer(sample.unsqueeze(0)), layer.weight, single)
            shares.append(layer.weight.detach() * share)
    for statistic, expected in loop(shares, 3).items():
        assert_close(getattr(scores, statistic)["0.weight"], expected)
    assert_close(scores.sensitivity["0.weight"], (scores.rms["0.weight"] / layer.weight.detach()).square())


class Reused(nn.Module):
    """One layer called twice, and a third time through a tied weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.b.weight = self.a.weight
        self.double()
        self.head.bias.data.add_(20.0)

    def forward(self, x):
        return self.head(self.b(self.a(self.a(x).relu()).relu()).relu())


def test_statistics_of_a_reused_layer_are_those_of_a_loop_over_calls():
    model, (x, y) = Reused(), data(4)

    scores = score(model, [(x, y)], explain="logit", epsilon=0.0, statistics=STATISTICS)

    shares = []
    for sample, label in zip(x, y, strict=True):
        first = model.a(sample)
        second = model.a(first.relu())
        third = model.b(second.relu())
        outputs = [first, second, third]
        c = torch.autograd.grad(model.head(third.relu())[label], outputs)
        inputs = [sample, first.relu(), second.relu()]
        shares += [model.a.weight.detach() * torch.outer(g, each.detach()) for g, each in zip(c, inputs, strict=True)]
    for statistic, expected in loop(shares, 3).items():
        assert_close(getattr(scores, statistic)["a.weight"], expected)


def small():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    model[-1].bias.data.add_(20.0)
    return model


def test_standard_error_is_the_weighted_spread_of_batch_means_also_with_a_smaller_last_batch():
    model, (x, y) = small(), data(4, samples=26)
    batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 26, 3)]

    scores = score(model, batches, explain="logit", statistics=("standard_error",))

    means = [score(model, [batch], explain="logit").relevance["0.weight"] for batch in batches]
    sizes = [3] * 8 + [2]
    mean = sum(n * each for n, each in zip(sizes, means, strict=True)) / 26
    variance = sum(n * (each - mean) ** 2 for n, each in zip(sizes, means, strict=True)) / (26 * 8)
    assert_close(scores.relevance["0.weight"], mean)
    assert_close(scores.standard_error["0.weight"], variance.sqrt())
    assert scores.batches == 9


def test_standard_error_of_single_samples_is_the_textbooks():
    model, (x, y) = small(), data(4, samples=10)
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(10)]

    scores = score(model, batches, explain="logit", statistics=("standard_error",))

    each = torch.stack([score(model, [batch], explain="logit").relevance["2.weight"] for batch in batches])
    assert_close(scores.standard_error["2.weight"], each.std(0) / 10**0.5)


def test_standard_error_of_seven_batches_is_refused():
    x, y = data(4, samples=7)

    with pytest.raises(RelevanceError, match="a standard error needs at least 8 batches, got 7: use smaller batches"):
        score(small(), [(x[i : i + 1], y[i : i + 1]) for i in range(7)], statistics=("standard_error",))


def sums_of(model, batches):
    statistics = ("rms", "absolute", "positive", "standard_error")
    sums, _ = relevance_sums(
        model, batches, layers=["0.weight", "2.weight"], explain="predicted", statistics=statistics
    )
    return sums


def half_and_half():
    model, (x, y) = small(), data(4, samples=30)
    model[-1].bias.data.sub_(20.2)  # some predicted logits are <= 0 and left out
    batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 30, 3)]
    return sums_of(model, batches), sums_of(model, batches[:4]), sums_of(model, batches[4:])


def assert_same_scores(actual, expected):
    actual, expected = actual.score_map(), expected.score_map()
    assert (actual.samples, actual.batches, actual.left_out) == (expected.samples, expected.batches, expected.left_out)
    assert 0 < expected.left_out < 30
    for statistic in ("score", "relevance", "rms", "absolute", "positive", "standard_error"):
        for name, tensor in getattr(expected, statistic).items():
            assert_close(getattr(actual, statistic)[name], tensor)


def test_merged_sums_of_two_halves_are_those_of_the_whole():
    whole, first, second = half_and_half()

    first.merge(second)

    assert_same_scores(first, whole)


def test_sums_reduced_over_two_processes_are_those_of_the_whole():
    whole, first, second = half_and_half()
    sent = []
    second.reduce(lambda tensor: sent.append(tensor.clone()) or tensor)

    first.reduce(lambda tensor: tensor + sent.pop(0))  # both processes call alike

    assert sent == []
    assert_same_scores(first, whole)


# Student's t by degrees of freedom and one-sided probability, from the usual printed table
QUANTILES = [(7, 0.95, 1.895), (7, 0.99, 2.998), (9, 0.95, 1.833), (15, 0.975, 2.131), (30, 0.9, 1.310)]


@pytest.mark.parametrize(("degrees", "confidence", "quantile"), QUANTILES)
def test_nonpositive_with_confidence_ends_at_students_quantile(degrees, confidence, quantile):
    relevance = torch.tensor([-1.01 * quantile, -0.99 * quantile, 0.5, torch.nan]) * 0.2
    scores = ScoreMap(
        *[{"w": each} for each in (relevance, relevance, relevance)],
        samples=80,
        standard_error={"w": torch.full((4,), 0.2)},
        batches=degrees + 1,
    )

    assert scores.nonpositive(confidence)["w"].tolist() == [True, False, False, False]
    assert scores.nonpositive()["w"].tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("confidence", "signed", "text"),
    [
        (0.95, True, "confidence needs a standard error"),
        (0.4, True, r"confidence must lie in \[0.5, 1\), got 0.4"),
        (1.0, True, r"confidence must lie in \[0.5, 1\), got 1.0"),
        (None, False, "these scores have no sign"),
    ],
)
def test_nonpositive_is_refused_where_it_has_no_meaning(confidence, signed, text):
    w = {"w": torch.zeros(2)}

    with pytest.raises(ValueError, match=text):
        ScoreMap(w, w, w, samples=1, signed=signed).nonpositive(confidence)
