"""Every criterion against a slow plain twin, and functions of the user's own."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from lightning_xai_compress import CompressionError, RelevanceError, ScoreMap, score
from lightning_xai_compress.criteria import CRITERIA


class Net(nn.Module):
    """A grouped convolution that is padded and strided, BatchNorm, a Linear on tokens, and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return self.head(F.relu(self.mix(x.flatten(2).mT)).mean(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Net().double()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2.0)
    return net.eval()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 4, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (7,), generator=generator)


def loss_gradients(model, x, y):
    """Gradient of minus the cross-entropy of each sample, by parameter name."""
    names = ("conv.weight", "mix.weight", "head.weight")
    result = []
    for sample, label in zip(x, y, strict=True):
        loss = -F.cross_entropy(model(sample.unsqueeze(0)), label.unsqueeze(0))
        weights = [dict(model.named_parameters())[name] for name in names]
        result.append(dict(zip(names, torch.autograd.grad(loss, weights), strict=True)))
    return {name: torch.stack([each[name] for each in result]) for name in names}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-14)


def test_taylor_is_the_mean_of_gradient_times_weight(model, data):
    scores = score(model, [data], "taylor")

    for name, gradients in loss_gradients(model, *data).items():
        weight = dict(model.named_parameters())[name].detach()
        close(scores.relevance[name], gradients.mean(0) * weight)
        close(scores.score[name], (gradients.mean(0) * weight).abs())


def test_taylor_goes_by_the_ordinary_gradient_where_lrp_does_not(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3)).double()

    scores = score(model, [data], "taylor")

    (-F.cross_entropy(model(data[0]), data[1], reduction="sum")).backward()
    close(scores.relevance["1.weight"], model[1].weight.grad * model[1].weight.detach() / 7)
    assert not torch.allclose(score(model, [data]).relevance["1.weight"], scores.relevance["1.weight"])


def test_fisher_is_the_mean_square_of_the_gradient_of_one_sample_times_the_weight_squared(model, data):
    scores = score(model, [data], "fisher")

    for name, gradients in loss_gradients(model, *data).items():
        weight = dict(model.named_parameters())[name].detach()
        close(scores.sensitivity[name], gradients.square().mean(0))
        close(scores.score[name], gradients.square().mean(0) * weight.square())


def test_fisher_collects_its_squares_whatever_statistics_are_asked_for(model, data):
    asked, default = score(model, [data], "fisher", statistics=()), score(model, [data], "fisher")

    for name in default.score:
        close(asked.score[name], default.score[name])


def test_wanda_is_the_weight_times_the_norm_of_what_it_meets(model, data):
    scores = score(model, [data], "wanda")

    x = data[0]
    patches = F.unfold(x, 3, padding=1, stride=2).view(7, 2, 18, 9)  # [samples, groups, weights of a row, positions]
    squares = patches.square().sum((0, 3)).repeat_interleave(3, 0).view(6, 2, 3, 3)
    close(scores.score["conv.weight"], model.conv.weight.detach().abs() * (squares / 7).sqrt())
    tokens = F.relu(model.norm(model.conv(x))).flatten(2).mT.detach()
    close(scores.score["mix.weight"], model.mix.weight.detach().abs() * (tokens.square().sum((0, 1)) / 7).sqrt())
    assert scores.samples == 7
    assert not scores.signed


def test_wanda_reaches_the_projections_of_attention():
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    model = Attention().double()
    x = torch.randn(5, 6, 4, dtype=torch.float64)

    scores = score(model, [(x, torch.tensor([0, 1, 2, 0, 1]))], "wanda")

    norm = (x.square().sum((0, 1)) / 5).sqrt()
    name = "attention.in_proj_weight"
    close(scores.score[name], model.attention.in_proj_weight.detach().abs() * norm)


def test_magnitude_needs_no_data_and_is_the_absolute_weight(model):
    scores = score(model, criterion="magnitude")

    assert torch.equal(scores.score["head.weight"], model.head.weight.detach().abs())
    assert scores.samples == 0
    assert not scores.signed


def test_lamp_is_the_square_over_the_squares_that_are_not_smaller():
    model = nn.Linear(3, 1)
    model.weight.data = torch.tensor([[2.0, -1.0, 3.0]])

    scores = score(model, criterion="lamp")

    torch.testing.assert_close(scores.score["weight"], torch.tensor([[4 / 13, 1 / 14, 1.0]]))


def test_random_scores_are_those_of_the_seed(model):
    first, same = (score(model, criterion="random", seed=3) for _ in range(2))
    other = score(model, criterion="random", seed=4)

    assert torch.equal(first.score["mix.weight"], same.score["mix.weight"])
    assert not torch.equal(first.score["mix.weight"], other.score["mix.weight"])
    assert 0.2 < float(first.score["conv.weight"].mean()) < 0.8


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_weight_in_the_same_form(model, data, criterion):
    scores = score(model, [data], criterion)

    assert set(scores.score) == {"conv.weight", "mix.weight", "head.weight"}
    for name, each in scores.score.items():
        assert torch.isfinite(each).all()
        assert bool((each >= 0).all())
        assert torch.isfinite(scores.sensitivity[name]).all()
    assert scores.unknown == []


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_sees_pruned_weights_as_zero(data, criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    mask = torch.rand(5, 144) > 0.5
    prune.custom_from_mask(model[1], "weight", mask)

    masked = score(model, [data], criterion)

    prune.remove(model[1], "weight")
    permanent = score(model, [data], criterion)
    close(masked.score["1.weight_orig"], permanent.score["1.weight"])
    if criterion != "random":
        assert masked.score["1.weight_orig"][~mask].abs().sum() == 0


def largest_input(model, batches, layers):
    """A criterion of one's own: |w| times the largest input in the data."""
    largest = max(float(x.abs().max()) for x, _ in batches)
    return {name: dict(model.named_parameters())[name].detach().abs() * largest for name in layers}


@pytest.mark.parametrize("criterion", [largest_input, f"{__name__}.largest_input"])
def test_a_criterion_of_ones_own_is_one_function(model, data, criterion):
    scores = score(model, [data], criterion)

    close(scores.score["head.weight"], model.head.weight.detach().abs() * data[0].abs().max())
    assert not scores.signed


def test_a_criterion_may_return_a_whole_score_map(model, data):
    def signed(model, batches, layers):
        weights = {name: dict(model.named_parameters())[name].detach() for name in layers}
        return ScoreMap({n: w.abs() for n, w in weights.items()}, weights, weights, 1)

    scores = score(model, [data], signed)

    assert scores.signed
    assert torch.equal(scores.relevance["head.weight"], model.head.weight.detach())


def test_a_score_map_of_a_criterion_is_brought_to_the_weights(model, data, monkeypatch):
    """Of another device there may be none: what is asked of the tensors is noted."""
    asked = []
    to = torch.Tensor.to

    def noted(tensor, *target, **settings):
        asked.append((tensor.data_ptr(), target))
        return to(tensor, *target, **settings)

    made = {}

    def mine(model, batches, layers):
        for part in ("score", "relevance", "sensitivity"):
            made[part] = {name: torch.ones(dict(model.named_parameters())[name].shape).half() for name in layers}
        monkeypatch.setattr(torch.Tensor, "to", noted)
        return ScoreMap(made["score"], made["relevance"], made["sensitivity"], 1)

    scores = score(model, [data], mine)

    for part, tensors in made.items():
        for name, tensor in tensors.items():
            targets = [target[0] for place, target in asked if place == tensor.data_ptr()]
            assert [target.device for target in targets] == [model.head.weight.device], (part, name)
            assert getattr(scores, part)[name].dtype == model.head.weight.dtype


def test_weights_that_a_criterion_leaves_out_are_unknown(model, data):
    scores = score(model, [data], lambda model, batches, layers: {"head.weight": torch.ones(3, 5)})

    assert scores.unknown == [entry.name for entry in scores.skipped] == ["conv.weight", "mix.weight"]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (3, "criterion mine returned a int: expected scores by parameter name"),
        ({"heat.weight": torch.ones(3)}, r"criterion mine scored \['heat.weight'\], which are not among the layers"),
        ({"head.weight": torch.ones(3)}, r"a score of shape \(3,\), expected that of the weight, \(3, 5\)"),
        ({"head.weight": -torch.ones(3, 5)}, "scores that are negative or infinite"),
        ({"head.weight": torch.full((3, 5), torch.inf)}, "scores that are negative or infinite"),
    ],
)
def test_what_a_criterion_returns_is_checked(model, data, result, text):
    def mine(model, batches, layers):
        return result

    with pytest.raises(RelevanceError, match=text):
        score(model, [data], mine)


@pytest.mark.parametrize(
    ("criterion", "text"),
    [
        ("magnitud", "criterion must be one of lrp, deeplift, .*, got 'magnitud'"),
        (3, "criterion must be one of"),
        ("nowhere.mine", "criterion 'nowhere.mine' cannot be imported: No module named 'nowhere'"),
        ("math.mine", "cannot be imported"),
        ("math.pi", "criterion 'math.pi' is no function"),
    ],
)
def test_no_such_criterion_is_an_error(model, data, criterion, text):
    with pytest.raises(ValueError, match=text):
        score(model, [data], criterion)


def test_a_criterion_that_needs_data_says_so(model):
    for criterion in ("lrp", "deeplift", "taylor", "fisher", "wanda"):
        with pytest.raises(RelevanceError, match="no sample to score"):
            score(model, [], criterion)


def test_a_model_without_layers_is_an_error():
    with pytest.raises(CompressionError, match="ReLU has no layer to score"):
        score(nn.ReLU(), criterion="magnitude")


def test_the_table_in_the_docstring_has_every_criterion():
    rows = [line.split("|")[1].strip() for line in inspect.getdoc(score).splitlines() if line.startswith('| "')]

    assert rows == [f'"{name}"' for name in CRITERIA]
