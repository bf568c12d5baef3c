"""What DeepLIFT compares with: the mean of the data, a blurred input, a tensor for each input."""

import math

import pytest
import torch
from oracles import assert_close
from torch import nn

from lightning_xai_compress import RelevanceError, score
from lightning_xai_compress.relevance import mean_inputs
from lightning_xai_compress.relevance.baselines import blurred


def model_of(inputs, generator=0):
    torch.manual_seed(generator)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches_of(*shape, sizes=(4, 4, 2)):
    return [(torch.randn(size, *shape, dtype=torch.float64), torch.arange(size) % 3) for size in sizes]


def same(one, other):
    for name, each in one.relevance.items():
        assert_close(each, other.relevance[name])
        assert_close(one.score[name], other.score[name])


def test_the_mean_is_of_all_samples_of_all_batches():
    model, batches = model_of(5), batches_of(5)

    scores = score(model, batches, "deeplift", baseline="mean")

    mean = torch.cat([x for x, _ in batches]).mean(0)
    same(scores, score(model, batches, "deeplift", baseline=mean))
    one_batch = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    same(scores, score(model, [one_batch], "deeplift", baseline="mean"))
    assert not torch.allclose(scores.score["1.weight"], score(model, batches, "deeplift").score["1.weight"])


def test_contributions_sum_to_the_change_from_the_mean_input():
    model, batches = model_of(5), batches_of(5)
    model[3].bias.data += 20.0

    scores = score(model, batches, "deeplift", baseline="mean", explain="logit")

    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    with torch.no_grad():
        change = (model(x) - model(x.mean(0, keepdim=True))).gather(1, y.unsqueeze(1)).mean()
    for name in ("1.weight", "3.weight"):
        assert_close(scores.relevance[name].sum(), change)


def test_a_constant_feature_is_worth_nothing_against_the_mean():
    model, batches = model_of(5), batches_of(5)
    for x, _ in batches:
        x[:, 2] = 3.0

    scores = score(model, batches, "deeplift", baseline="mean")

    assert scores.score["1.weight"][:, 2].abs().max() < 1e-12
    assert scores.score["1.weight"][:, 0].min() > 0


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.picture, self.sound = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, picture, sound):
        return (self.picture(picture) + self.sound(sound)).tanh() + 2


def test_every_input_has_its_own_baseline():
    torch.manual_seed(0)
    model, picture, sound = Both().double(), torch.randn(5, 4).double(), torch.randn(5, 2).double() + 1
    batches = [{"sound": sound, "picture": picture, "labels": torch.arange(5) % 3}]

    scores = score(model, batches, "deeplift", baseline="mean")

    same(scores, score(model, batches, "deeplift", baseline=[sound.mean(0), picture.mean(0)]))
    with pytest.raises(RelevanceError, match="expected a baseline for each of the 2 inputs, got 1"):
        score(model, batches, "deeplift", baseline=[sound.mean(0)])
    with pytest.raises(RelevanceError, match=r"a baseline of shape \(4,\) does not broadcast .* of input 0"):
        score(model, batches, "deeplift", baseline=[picture.mean(0), sound.mean(0)])


def gaussian(x):
    """A tenth of the length wide, written out for one row."""
    width = 0.1 * len(x)
    found = []
    for at in range(len(x)):
        weights = [math.exp(-(((at - other) / width) ** 2) / 2) for other in range(len(x))]
        found.append(sum(w * v for w, v in zip(weights, x.tolist(), strict=True)) / sum(weights))
    return torch.tensor(found, dtype=x.dtype)


def test_a_blurred_picture_is_one_under_a_gaussian_of_both_dimensions():
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)

    found = blurred(x)

    expected = torch.stack([gaussian(column) for column in x.movedim(2, -1).reshape(-1, 7)]).view(2, 3, 5, 7)
    expected = expected.movedim(-1, 2)
    expected = torch.stack([gaussian(row) for row in expected.reshape(-1, 5)]).view(2, 3, 7, 5)
    assert_close(found, expected)
    assert_close(blurred(torch.full_like(x, 2.5)), torch.full_like(x, 2.5))


def test_the_input_is_compared_with_itself_blurred():
    x, y = torch.randn(4, 1, 6, 6, dtype=torch.float64), torch.arange(4) % 3
    model = model_of(36)

    scores = score(model, [(x, y)], "deeplift", baseline="blurred")

    same(scores, score(model, [(x, y)], "deeplift", baseline=blurred(x)))


def test_half_precision_is_averaged_in_full():
    x = torch.full((2049, 1), 1.0, dtype=torch.float16)  # whose sum in float16 would stop at 2048

    assert mean_inputs([(x, torch.zeros(len(x)).long())])[0].item() == 1.0


@pytest.mark.parametrize(
    ("batches", "baseline", "text"),
    [
        (lambda: iter(batches_of(5)), "mean", "'mean' goes through the batches twice, but an iterator gives them once"),
        (
            lambda: batches_of(5) + batches_of(1, 5),
            "mean",
            r"needs samples of one shape, but batch 3 has \[\(1, 5\)\] where others have \[\(5,\)\]",
        ),
        (list, "mean", "there is no mean input"),
        (lambda: batches_of(5), "blurred", r"an input of shape \(4, 5\) has not: use a number, 'mean' or a tensor"),
    ],
)
def test_what_has_no_such_baseline_is_refused(batches, baseline, text):
    with pytest.raises(RelevanceError, match=text):
        score(model_of(5), batches(), "deeplift", baseline=baseline)


@pytest.mark.parametrize(
    ("baseline", "text"),
    [
        ("median", "baseline must be a number, 'mean', 'blurred', a tensor .*, got 'median'"),
        (True, "baseline must be a number, got True"),
        (float("inf"), "baseline must be finite, got inf"),
        (torch.tensor([0.0, float("nan")]), "the tensor holds NaN or infinity"),
        ([], "must hold a tensor for each input"),
        ([1.0], "must hold a tensor for each input"),
    ],
)
def test_what_is_no_baseline_is_refused(baseline, text):
    with pytest.raises(ValueError, match=text):
        score(model_of(5), batches_of(5), "deeplift", baseline=baseline)


def test_other_criteria_have_no_baseline_to_compute():
    model, batches = model_of(5), batches_of(5)

    same(score(model, iter(batches), "lrp", baseline="mean"), score(model, batches, "lrp"))
