"""Batches and outputs of the kinds that people have."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xai_compress import RelevanceError, score
from lightning_xai_compress.relevance.explain import explained_tensor, split_batch

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def linear():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    layer.bias.data.add_(20.0)  # no logit is negative and left out
    return layer


@pytest.mark.parametrize("batch", [(X, Y), [X, Y, "extra"], {"image": X, "label": Y}, {"x": X, "targets": Y}])
def test_common_batches_are_understood(linear, batch):
    explained, samples, *_ = explained_tensor(linear, batch, 0, "logit")

    assert samples == 6
    torch.testing.assert_close(explained.sum(), linear(X).gather(1, Y.unsqueeze(1)).sum())


def test_dictionaries_without_a_known_input_go_to_the_model_as_keywords():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, tokens, mask):
            return SimpleNamespace(logits=self.layer(tokens * mask))

    scores = score(Encoder(), [{"tokens": X, "mask": torch.ones_like(X), "labels": Y}])

    assert scores.unknown == []


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (X, r"got a torch.float32 tensor of shape \(6, 4\)"),
        ({"pixels": X}, r"got a dict with keys \['pixels'\]"),
        (("a", "b"), r"got a tuple of \(a str, a str\)"),
    ],
)
def test_other_batches_are_refused_and_the_way_out_is_named(batch, text):
    with pytest.raises(RelevanceError, match=text) as error:
        split_batch(batch)
    assert "Define relevance_step(self, batch, batch_idx) on the LightningModule" in str(error.value)


def test_an_own_relevance_step_goes_first(linear):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear

        def relevance_step(self, batch, batch_idx):
            return self.layer(batch["whatever"])[:, batch_idx]

    own = score(Own(), [{"whatever": X}], epsilon=0.0)
    expected = linear.weight.detach() * torch.cat([X.sum(0, keepdim=True), torch.zeros(2, 4)]) / 6

    torch.testing.assert_close(own.relevance["layer.weight"], expected)


def test_a_relevance_step_must_return_a_tensor(linear):
    linear.relevance_step = lambda batch, batch_idx: None
    with pytest.raises(RelevanceError, match="relevance_step returned a NoneType, expected a tensor"):
        score(linear, [(X, Y)])


@pytest.mark.parametrize(
    ("target", "loss"),
    [
        (torch.tensor([[1.0, 0.0, 1.0]] * 6), lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="sum")),
        (torch.linspace(-2, 2, 18).view(6, 3), lambda z, t: 0.5 * (z - t).square().sum()),
        (torch.rand(6, 3).softmax(1), lambda z, t: F.cross_entropy(z, t, reduction="sum")),
        (F.one_hot(Y, 3).float(), lambda z, t: F.cross_entropy(z, t, reduction="sum")),
    ],
    ids=["several labels", "regression", "soft classes", "one-hot classes"],
)
def test_the_margin_is_minus_the_loss_gradient_of_several_labels_and_regression(linear, target, loss):
    explained = explained_tensor(linear, (X, target), 0, "margin").tensor

    logits = linear(X).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    torch.testing.assert_close(explained, -gradient * logits)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_logit_and_binary_labels_are_explained_by_the_sigmoid(dtype, shape):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    target = torch.tensor([0, 1, 1, 0, 1, 0])

    explained = explained_tensor(model, (X, target.to(dtype).view(shape)), 0, "margin").tensor

    logits = model(X).detach()
    torch.testing.assert_close(explained, logits * (target.view(6, 1) - logits.sigmoid()))
    assert explained.abs().sum() > 0


def test_a_transposed_target_is_refused(linear):
    with pytest.raises(RelevanceError, match=r"logits of shape \(6, 3\) and a torch.float32 target of shape \(3, 6\)"):
        explained_tensor(linear, (X, torch.ones(3, 6)), 0, "margin")


def test_segmentation_is_explained_by_pixel_and_ignored_pixels_are_not():
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 1)
    x, y = torch.randn(2, 2, 4, 4), torch.randint(0, 3, (2, 4, 4))
    y[0, 0] = -100

    explained = explained_tensor(model, (x, y), 0, "margin").tensor

    logits = model(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    torch.testing.assert_close(explained, -gradient * logits)


def test_targets_that_do_not_fit_the_logits_are_refused(linear):
    with pytest.raises(RelevanceError, match=r"logits of shape \(6, 3\) and a torch.float32 target of shape \(6,\)"):
        explained_tensor(linear, (X, Y.float()), 0, "margin")


def test_outputs_without_a_tensor_are_refused(linear):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear

        def forward(self, x):
            return "logits"

    with pytest.raises(RelevanceError, match="the model returned a str"):
        score(Text(), [(X, Y)])
