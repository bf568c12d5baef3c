"""The engine against gradient x weight, against zennit, and against slow plain loops."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zennit.composites import LayerMapComposite, layer_map_base
from zennit.rules import Epsilon

from lightning_xai_compress import RelevanceError, score
from lightning_xai_compress.errors import NonFiniteError


class Net(nn.Module):
    """Convolutions with BatchNorm, a residual sum, functional pooling, a Linear; ReLUs in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        x = x + F.leaky_relu(self.second(x), 0.1)
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


def build(module, seed=0):
    torch.manual_seed(seed)
    module = module().double()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
            layer.weight.data.uniform_(-1.5, 1.5)
    return module


def lift(model):
    """Make all logits positive, so that none is left out."""
    [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].bias.data.add_(20.0)
    return model


def batch(*shape, classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (shape[0],), generator=generator)


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


def test_random_numbers_drawn_in_a_forward_pass_are_not_the_trainings():
    class Noisy(Net):
        def forward(self, x):
            return F.dropout(super().forward(x), training=True)

    model, (x, y) = build(Noisy), batch(8, 2, 6, 6)
    before = torch.get_rng_state()

    score(model, [(x, y)])

    assert torch.equal(torch.get_rng_state(), before)


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
