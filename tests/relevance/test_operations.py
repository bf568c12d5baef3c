"""What each operation passes back: exact identities where one exists, otherwise the papers' definitions written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from lightning_xai_compress import score


class Net(nn.Module):
    """`run(self, x)` over named layers, then a Linear whose bias makes all logits positive."""

    def __init__(self, run, shape, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run
        self.double()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.weight.data.uniform_(-1.5, 1.5)
                module.bias.data.normal_()
        with torch.no_grad():
            features = self.eval().run(self, torch.ones(2, *shape, dtype=torch.float64)).flatten(1).shape[1]
        self.head = nn.Linear(features, 3, dtype=torch.float64)
        self.head.bias.data.fill_(30.0)

    def forward(self, x):
        return self.head(self.run(self, x).flatten(1))


def batch(*shape, samples=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def gradient_times_weight(model, x, y):
    model = copy.deepcopy(model).eval().requires_grad_()
    model(x).gather(1, y.unsqueeze(1)).sum().backward()
    return {name: (p.grad * p.detach()) / len(x) for name, p in model.named_parameters()}


def assert_gradient_times_weight(model, shape):
    x, y = batch(*shape)

    scores = score(model, [(x, y)], explain="logit", epsilon=0.0)

    assert scores.samples == len(x)
    assert scores.unknown == []
    expected = gradient_times_weight(model, x, y)
    for name, relevance in scores.relevance.items():
        torch.testing.assert_close(relevance, expected[name], rtol=1e-9, atol=1e-14, msg=name)
        assert relevance.abs().max() > 1e-4, name
    return scores


LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), (2, 9)),
    "Conv1d grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), (4, 9)),
    "Conv1d reflect": (lambda: nn.Conv1d(2, 4, 3, padding=2, padding_mode="reflect"), (2, 9)),
    "Conv2d": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(1, 2)), (2, 6, 6)),
    "Conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6)),
    "Conv2d depthwise times 2": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), (3, 5, 5)),
    "Conv2d dilated": (lambda: nn.Conv2d(2, 4, 3, dilation=2, padding=2), (2, 6, 6)),
    "Conv2d same": (lambda: nn.Conv2d(2, 4, (2, 4), padding="same"), (2, 6, 6)),
    "Conv2d valid": (lambda: nn.Conv2d(2, 4, 3, padding="valid"), (2, 6, 6)),
    "Conv2d reflect": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 6, 6)),
    "Conv2d replicate": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate"), (2, 6, 6)),
    "Conv2d circular": (lambda: nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), (2, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(1, 4, 2, stride=2, padding=(0, 1, 0)), (1, 4, 4, 4)),
    "Conv3d grouped": (lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=2), (2, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1), (2, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, dilation=2), (2, 4, 4)),
    "ConvTranspose2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), (4, 4, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(1, 2, 2, stride=2), (1, 3, 3, 3)),
    "Linear": (lambda: nn.Linear(4, 6), (4,)),
    "Linear on tokens": (lambda: nn.Linear(4, 6), (5, 4)),
    "Linear on a grid of tokens": (lambda: nn.Linear(4, 6, bias=False), (2, 3, 4)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_with_epsilon_zero_a_layer_gets_gradient_times_weight(layer, shape):
    assert_gradient_times_weight(Net(lambda m, x: F.relu(m.layer(x)), shape, layer=layer()), shape)


def conv(channels=2, bias=True):
    return nn.Conv2d(channels, 4, 3, padding=1, bias=bias)


def twice(m, x):
    x = F.relu(m.conv(x))
    return F.relu(m.again(x) + m.again(F.relu(m.again(x))))


def added_in_place(m, x):
    out = m.conv(x)
    out += F.relu(m.other(x))
    return out


def one_by_one(m, x):
    return torch.stack([F.relu(m.conv(each)) for each in x])


PIECEWISE_LINEAR = {
    "BatchNorm after": (lambda m, x: F.relu(m.norm(m.conv(x))), {"conv": conv, "norm": lambda: nn.BatchNorm2d(4)}),
    "BatchNorm before": (lambda m, x: m.conv(F.relu(m.norm(x))), {"conv": conv, "norm": lambda: nn.BatchNorm2d(2)}),
    "BatchNorm registered first": (lambda m, x: m.norm(m.conv(x)), {"norm": lambda: nn.BatchNorm2d(4), "conv": conv}),
    "BatchNorm without bias before": (
        lambda m, x: F.relu(m.norm(m.conv(x))), {"conv": lambda: conv(bias=False), "norm": lambda: nn.BatchNorm2d(4)}),
    "BatchNorm of a Linear": (
        lambda m, x: m.norm(m.fc(x.flatten(1))), {"fc": lambda: nn.Linear(72, 5), "norm": lambda: nn.BatchNorm1d(5)}),
    "BatchNorm of a transposed convolution": (
        lambda m, x: m.norm(m.up(x)), {"up": lambda: nn.ConvTranspose2d(2, 4, 2), "norm": lambda: nn.BatchNorm2d(4)}),
    "ReLU module": (lambda m, x: m.act(m.conv(x)), {"conv": conv, "act": nn.ReLU}),
    "ReLU in place": (lambda m, x: m.act(m.conv(x)), {"conv": conv, "act": lambda: nn.ReLU(inplace=True)}),
    "relu_": (lambda m, x: m.conv(x).relu_(), {"conv": conv}),
    "relu method": (lambda m, x: m.conv(x).relu(), {"conv": conv}),
    "F.relu in place, result ignored": (lambda m, x: (z := m.conv(x), F.relu(z, True))[0], {"conv": conv}),
    "reused ReLU": (
        lambda m, x: m.act(m.other(m.act(m.conv(x)))), {"conv": conv, "other": lambda: conv(4), "act": nn.ReLU}),
    "LeakyReLU": (lambda m, x: m.act(m.conv(x)), {"conv": conv, "act": lambda: nn.LeakyReLU(0.2, inplace=True)}),
    "F.leaky_relu": (lambda m, x: F.leaky_relu(m.conv(x), 0.3), {"conv": conv}),
    "PReLU": (lambda m, x: m.act(m.conv(x)), {"conv": conv, "act": lambda: nn.PReLU(4)}),
    "F.prelu": (lambda m, x: F.prelu(m.conv(x), torch.tensor([0.1]).double()), {"conv": conv}),
    "sum": (lambda m, x: F.relu(m.conv(x)) + m.other(x), {"conv": conv, "other": conv}),
    "sum in place": (added_in_place, {"conv": conv, "other": conv}),
    "difference and scale": (lambda m, x: (2 * m.conv(x) - m.other(x) / 3).neg(), {"conv": conv, "other": conv}),
    "max pooling": (lambda m, x: F.max_pool2d(m.conv(x), 2), {"conv": conv}),
    "max pooling module": (lambda m, x: m.pool(m.conv(x)), {"conv": conv, "pool": lambda: nn.MaxPool2d(3, 2, 1)}),
    "average pooling": (lambda m, x: F.avg_pool2d(F.relu(m.conv(x)), 3, 1, 1), {"conv": conv}),
    "adaptive pooling": (
        lambda m, x: m.pool(F.relu(m.conv(x))), {"conv": conv, "pool": lambda: nn.AdaptiveAvgPool2d((2, 3))}),
    "adaptive max pooling": (lambda m, x: F.adaptive_max_pool2d(m.conv(x), 2), {"conv": conv}),
    "mean": (lambda m, x: F.relu(m.conv(x)).mean((2, 3)), {"conv": conv}),
    "maximum": (lambda m, x: m.conv(x).amax((2, 3)), {"conv": conv}),
    "concat": (lambda m, x: torch.cat([x, F.relu(m.conv(x))], 1), {"conv": conv}),
    "pad": (lambda m, x: F.pad(F.relu(m.conv(x)), (1, 2, 0, -1), "reflect"), {"conv": conv}),
    "view and permute": (
        lambda m, x: m.fc(F.relu(m.conv(x)).view(-1, 4, 36).transpose(1, 2)),
        {"conv": conv, "fc": lambda: nn.Linear(4, 3)}),
    "interpolate": (lambda m, x: F.interpolate(m.conv(x), scale_factor=2, mode="bilinear"), {"conv": conv}),
    "masked fill, where": (
        lambda m, x: torch.where(x[:, :1] > 0, m.conv(x), 0.0).masked_fill(x[:, 1:] > 1, 0), {"conv": conv}),
    "reused convolution": (twice, {"conv": conv, "again": lambda: conv(4)}),
    "unbatched calls": (one_by_one, {"conv": conv}),
}  # fmt: skip


@pytest.mark.parametrize(("run", "layers"), PIECEWISE_LINEAR.values(), ids=PIECEWISE_LINEAR)
def test_with_epsilon_zero_piecewise_linear_networks_get_gradient_times_weight(run, layers):
    assert_gradient_times_weight(Net(run, (2, 6, 6), **{name: make() for name, make in layers.items()}), (2, 6, 6))


def test_one_parameter_in_two_modules_gets_the_sum_of_both():
    model = Net(lambda m, x: m.b(F.relu(m.a(x))), (4,), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight

    scores = assert_gradient_times_weight(model, (4,))

    assert set(scores.relevance) == {"a.weight", "head.weight"}


def test_frozen_parameters_are_scored_like_others():
    model = Net(lambda m, x: F.relu(m.norm(m.conv(x))), (2, 6, 6), conv=conv(), norm=nn.BatchNorm2d(4))
    model.requires_grad_(False)

    scores = assert_gradient_times_weight(model, (2, 6, 6))

    assert set(scores.relevance) == {"conv.weight", "head.weight"}


IN_PLACE = {
    "relu_": (lambda z: z.relu_(), lambda z: z.relu()),
    "torch.relu_": (lambda z: torch.relu_(z), lambda z: z.relu()),
    "ReLU(inplace)": (nn.ReLU(inplace=True), nn.ReLU()),
    "leaky_relu_": (lambda z: F.leaky_relu_(z, 0.2), lambda z: F.leaky_relu(z, 0.2)),
    "LeakyReLU(inplace)": (nn.LeakyReLU(0.2, inplace=True), nn.LeakyReLU(0.2)),
    "add_": (lambda z: z.add_(1.0), lambda z: z + 1),
    "mul_": (lambda z: z.mul_(3.0), lambda z: z * 3),
    "+=": (lambda z: z.__iadd__(z.detach().flip(1)), lambda z: z + z.detach().flip(1)),
    "mul_ and add_": (lambda z: z.mul_(3.0).add_(1.0), lambda z: 3 * z + 1),
    "clamp_": (lambda z: z.clamp_(min=0), lambda z: z.clamp(min=0)),
    "SiLU(inplace)": (nn.SiLU(inplace=True), nn.SiLU()),
    "view written to": (lambda z: z.view(-1).mul_(2.0).view_as(z), lambda z: 2 * z),
    "indexed": (
        lambda z: (z.__setitem__((slice(None), 0), 0.0), z)[1], lambda z: torch.cat([0 * z[:, :1], z[:, 1:]], 1)),
}  # fmt: skip


@pytest.mark.parametrize("composite", ["epsilon", "zplus"])
@pytest.mark.parametrize("layer", [conv, lambda: nn.Linear(6, 5)], ids=["convolution", "tokens"])
@pytest.mark.parametrize(("written", "plain"), IN_PLACE.values(), ids=IN_PLACE)
def test_what_is_written_into_the_output_of_a_layer_does_not_change_its_epsilon(written, plain, layer, composite):
    shape = (2, 6, 6)
    model = Net(lambda m, x: plain(m.layer(x)), shape, layer=layer())
    x, y = batch(*shape)
    results = []
    for act in (written, plain):
        model.run = lambda m, x, act=act: act(m.layer(x))
        results.append(score(model, [(x, y)], explain="logit", epsilon=0.3, composite=composite))

    torch.testing.assert_close(results[0].relevance, results[1].relevance, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[0].sensitivity, results[1].sensitivity, rtol=1e-12, atol=1e-14)
    assert results[0].relevance["layer.weight"].abs().max() > 1e-4


@pytest.mark.parametrize("composite", ["epsilon", "zplus"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.SiLU])
def test_a_norm_after_an_activation_in_place_does_not_directly_follow_the_layer(act, composite):
    shape, results = (2, 6, 6), []
    model = Net(lambda m, x: m.norm(m.act(m.conv(x))), shape, conv=conv(), act=nn.Identity(), norm=nn.BatchNorm2d(4))
    for inplace in (True, False):
        model.act = act(inplace=inplace)
        results.append(score(model, [batch(*shape)], composite=composite))

    for kind in ("relevance", "sensitivity", "score"):
        torch.testing.assert_close(*(getattr(each, kind) for each in results), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("composite", ["epsilon", "zplus", "gamma"])
def test_a_masked_model_scores_like_the_same_weights_made_permanent(composite):
    shape = (2, 6, 6)
    model = Net(
        lambda m, x: m.fc(F.relu(m.norm(m.conv(x))).mean((2, 3))),
        shape, conv=conv(), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 5),
    )  # fmt: skip
    permanent = copy.deepcopy(model)
    prune.random_unstructured(model.conv, "weight", 0.5)
    prune.l1_unstructured(model.fc, "weight", 0.3)
    for layer in ("conv", "fc"):
        getattr(permanent, layer).weight.data = getattr(model, layer).weight.detach()
    x, y = batch(*shape)
    before = model.conv.weight

    masked = score(model, [(x, y)], explain="logit", composite=composite)

    assert model.conv.weight is before
    expected = score(permanent, [(x, y)], explain="logit", composite=composite)
    for name in ("conv.weight", "fc.weight"):
        for kind in ("score", "relevance", "sensitivity"):
            torch.testing.assert_close(getattr(masked, kind)[f"{name}_orig"], getattr(expected, kind)[name])
    assert (masked.score["conv.weight_orig"][model.conv.weight_mask == 0] == 0).all()


@pytest.mark.parametrize("compiled", ["wrapped", "in place", "a layer wrapped", "a layer in place"])
def test_a_compiled_model_scores_like_the_original(compiled):
    shape = (2, 6, 6)
    model = Net(lambda m, x: F.relu(m.norm(m.conv(x))), shape, conv=conv(), norm=nn.BatchNorm2d(4))
    x, y = batch(*shape)
    expected = score(model, [(x, y)])
    if compiled == "wrapped":
        subject = torch.compile(model, backend="eager")
    elif compiled == "in place":
        subject = model
        model.compile(backend="eager")
    elif compiled == "a layer wrapped":
        subject = model
        model.conv = torch.compile(model.conv, backend="eager")
    else:
        subject = model
        model.conv.compile(backend="eager")
    subject(x)  # so that compiled code is there to be called

    scores = score(subject, [(x, y)])

    values = {name.replace("_orig_mod.", ""): each for name, each in scores.relevance.items()}
    torch.testing.assert_close(values, expected.relevance, rtol=0, atol=0)
    assert set(scores.score) <= {name for name, _ in model.named_parameters()}
