"""How a pass runs: what it leaves as it was, what it adds up, and what it refuses."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xai_compress import RelevanceError, score
from lightning_xai_compress.errors import NonFiniteError

from nets import Net, batch, build


def test_random_numbers_drawn_in_a_forward_pass_are_not_the_trainings():
    class Noisy(Net):
        def forward(self, x):
            return F.dropout(super().forward(x), training=True)

    model, (x, y) = build(Noisy), batch(8, 2, 6, 6)
    before = torch.get_rng_state()

    score(model, [(x, y)])

    assert torch.equal(torch.get_rng_state(), before)


def test_batches_add_up_to_one_batch():
    model, (x, y) = build(Net), batch(12, 2, 6, 6)

    whole = score(model, [(x, y)])
    parts = score(model, [(x[:5], y[:5]), (x[5:], y[5:])])

    assert whole.samples == parts.samples == 12
    for name in whole.score:
        torch.testing.assert_close(parts.relevance[name], whole.relevance[name], rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(parts.score[name], whole.score[name], rtol=1e-9, atol=1e-14)


def test_the_model_is_left_as_found():
    model, (x, y) = build(Net), batch(8, 2, 6, 6)
    model.train()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    model.first.weight.grad = torch.ones_like(model.first.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identity = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    flags = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        score(model, [(x, y)])
        assert torch.is_autocast_enabled("cpu")
    with pytest.raises(RelevanceError):
        score(model, [x])

    assert [module.training for module in model.modules()] == flags
    assert {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()} == identity
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model.first.weight.grad, torch.ones_like(model.first.weight))
    assert model.second.weight.grad is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_the_pass_frees_its_graph():
    model, (x, y) = build(Net), batch(11, 2, 6, 6)

    score(model, [(x, y), (x, y)])

    gc.collect()
    hidden = (11, 6, 6, 6)
    assert not [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape == hidden]


def test_scores_are_the_same_within_inference_mode():
    model, (x, y) = build(Net), batch(8, 2, 6, 6)
    expected = score(model, [(x, y)])

    with torch.inference_mode():
        x, y = x.clone(), y.clone()
        scores = score(model, [(x, y)])

    for name in expected.score:
        assert torch.equal(scores.score[name], expected.score[name])


def test_half_precision_models_are_scored_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    x, y = batch(6, 4, classes=3)

    scores = score(model, [(x.bfloat16(), y)])

    wide = score(model.float(), [(x.bfloat16().float(), y)])
    for name in wide.score:
        assert scores.score[name].dtype == torch.float32
        assert torch.equal(scores.score[name], wide.score[name])


def test_layers_without_a_call_are_unknown_not_zero():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    x, y = batch(6, 4, classes=3)
    scores = score(Idle().double(), [(x, y)])

    assert scores.unknown == ["idle.weight"]
    assert scores.score["idle.weight"].isnan().all()
    assert not scores.score["used.weight"].isnan().any()


def test_nan_in_a_batch_is_an_error_that_names_the_batch():
    model, (x, y) = build(Net), batch(8, 2, 6, 6)
    bad = x.clone()
    bad[0, 0, 0, 0] = torch.nan

    with pytest.raises(NonFiniteError, match="batch 1: what is explained is not finite"):
        score(model, [(x, y), (bad, y)])


def test_no_batches_is_an_error():
    with pytest.raises(RelevanceError, match="no sample to score"):
        score(build(Net), [])


def test_a_detached_output_is_an_error():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x).detach()

    x, y = batch(6, 4, classes=3)
    with pytest.raises(RelevanceError, match="does not depend on any weight"):
        score(Detached().double(), [(x, y)])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"epsilon": -1.0}, "epsilon must be >= 0"),
        ({"explain": "loss"}, "explain must be 'margin', 'logit' or 'predicted'"),
    ],
)
def test_bad_settings_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        score(build(Net), [batch(2, 2, 6, 6)], **arguments)
