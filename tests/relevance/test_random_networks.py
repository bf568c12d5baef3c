"""A search over small random networks for the identities that the engine must keep."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import zennit_heat_map
from torch import nn
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import LayerMapComposite, layer_map_base
from zennit.rules import Epsilon, Gamma, ZPlus
from zennit.types import Linear

from lightning_xai_compress import score

CONVOLUTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)
MAX_POOLS, MEAN_POOLS = (F.max_pool1d, F.max_pool2d), (F.avg_pool1d, F.avg_pool2d)
POOLS = ((nn.MaxPool1d, nn.MaxPool2d), (nn.AvgPool1d, nn.AvgPool2d))
KINDS = ("plain", "norm first", "residual", "residual in place", "concatenation", "reused", "tied")
few = settings(derandomize=True, deadline=None, max_examples=200)


class Block(nn.Module):
    """One or two layers with what stands around them.

    Args:
        dims: Spatial axes, 0 to 2.
    """

    def __init__(self, draw, kind, dims, width):
        super().__init__()
        self.kind, self.dims = kind, dims
        self.wider = draw(st.integers(1, 5)) if kind in ("plain", "concatenation") else width
        self.first = layer(draw, dims, width, self.wider)
        self.second = layer(draw, dims, width, width)
        if kind == "tied":
            self.second = copy.deepcopy(self.first)
            self.second.weight = self.first.weight
        self.norm = NORMS[dims](width if kind == "norm first" else self.wider) if draw(st.booleans()) else nn.Identity()
        self.act, self.act_in_place = activation(draw, inplace=False), activation(draw, inplace=draw(st.booleans()))
        self.pool = draw(st.sampled_from((None, MAX_POOLS, MEAN_POOLS))) if dims and kind == "plain" else None

    def forward(self, x):
        if self.kind == "norm first":
            return self.first(self.act(self.norm(x)))
        y = self.norm(self.first(x))
        if self.kind == "concatenation":
            return torch.cat([y, self.act(self.second(x))], 1)
        if self.kind == "residual":
            return x + self.act_in_place(y)
        if self.kind == "residual in place":
            y += x
            return self.act_in_place(y)
        if self.kind == "reused":
            return self.first(self.act_in_place(y))
        if self.kind == "tied":
            return self.second(self.act_in_place(y))
        y = self.act_in_place(y)
        return y if self.pool is None else self.pool[self.dims - 1](y, 2, 1, 1)

    def width(self, width):
        return self.wider + width if self.kind == "concatenation" else self.wider


def layer(draw, dims, width, wider):
    bias = draw(st.booleans())
    if not dims:
        return nn.Linear(width, wider, bias=bias)
    size, dilation = draw(st.sampled_from((1, 3))), draw(st.integers(1, 2))
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if width % g == wider % g == 0]))
    mode = draw(st.sampled_from(("zeros", "circular", "replicate")))
    padding = dilation * (size - 1) // 2  # keeps the size
    settings = {"padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode, "bias": bias}
    return CONVOLUTIONS[dims](width, wider, size, **settings)


def activation(draw, *, inplace):
    kind = draw(st.sampled_from(("ReLU", "LeakyReLU", "PReLU", "functional", "none")))
    if kind == "functional":
        return (lambda x: x.relu_()) if inplace else (lambda x: F.leaky_relu(x, -0.2))
    modules = {"ReLU": nn.ReLU(inplace), "LeakyReLU": nn.LeakyReLU(0.3, inplace), "PReLU": nn.PReLU()}
    return modules.get(kind, nn.Identity())


class Network(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.dims, self.inputs = draw(st.integers(0, 2)), draw(st.integers(1, 4))
        self.blocks, width = nn.ModuleList(), self.inputs
        for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)):
            self.blocks.append(Block(draw, kind, self.dims, width))
            width = self.blocks[-1].width(width)
        self.flatten = draw(st.booleans())
        size = torch.zeros(1, self.inputs, *[4] * self.dims)
        self.head = nn.Linear(self.eval().features(size).shape[1], 3)

    def features(self, x):
        for block in self.blocks:
            x = block(x)
        return x.flatten(1) if self.flatten or not self.dims else x.flatten(2).mean(2)

    def forward(self, x):
        return self.head(self.features(x))


def settle(model):
    """In float64, norms with values of their own (eps = 0, which zennit leaves in), logits positive."""
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eps = 0.0
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(-1.5, 1.5)
            module.bias.data.normal_()
    [each for each in model.modules() if isinstance(each, nn.Linear)][-1].bias.data.fill_(1000.0)
    return model


@st.composite
def networks(draw):
    torch.manual_seed(draw(st.integers(0, 999)))
    model = settle(Network(draw))
    return model, torch.randn(3, model.inputs, *[4] * model.dims, dtype=torch.float64), torch.tensor([2, 0, 1])


@few
@given(networks())
def test_epsilon_zero_is_gradient_times_weight(network):
    model, x, y = network

    scores = score(model, [(x[:2], y[:2]), (x[2:], y[2:])], explain="logit", epsilon=0.0)

    assert scores.samples == 3
    model(x).gather(1, y.unsqueeze(1)).sum().backward()
    parameters = dict(model.named_parameters())
    reached = {name for name, parameter in parameters.items() if parameter.grad is not None}
    assert reached >= scores.relevance.keys() - set(scores.unknown) >= {"head.weight"}
    for name in scores.relevance.keys() - set(scores.unknown):
        expected = parameters[name].grad * parameters[name].detach() / 3
        atol = 1e-12 * float(expected.abs().max())
        torch.testing.assert_close(scores.relevance[name], expected, rtol=1e-9, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023


@few
@given(networks())
def test_deeplift_sums_to_the_change_of_the_output(network):
    model, x, y = network

    scores = score(model, [(x, y)], "deeplift", baseline=0.3, explain="logit", heatmaps=3)

    with torch.no_grad():
        change = (model(x) - model(torch.full_like(x, 0.3))).gather(1, y.unsqueeze(1)).squeeze(1)
    assert scores.samples == 3
    torch.testing.assert_close(scores.heatmaps.relevance.flatten(1).sum(1), change, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores.relevance["head.weight"].sum(), change.mean(), rtol=1e-9, atol=1e-9)


@st.composite
def sequences(draw):
    """What zennit's canonizer and hooks get right: modules in a row, each used once."""
    torch.manual_seed(draw(st.integers(0, 999)))
    dims, inputs = draw(st.integers(0, 2)), draw(st.integers(1, 4))
    modules, width = [], inputs
    for _ in range(draw(st.integers(1, 3))):
        wider = draw(st.integers(1, 5))
        modules.append(layer(draw, dims, width, wider))
        if draw(st.booleans()):
            modules.append(NORMS[dims](wider))
        kinds = (nn.ReLU(), nn.LeakyReLU(0.3), nn.PReLU(), nn.Tanh(), nn.Softsign())
        modules.append(draw(st.sampled_from(kinds)))
        if dims and draw(st.booleans()):
            modules.append(draw(st.sampled_from(POOLS))[dims - 1](2, 1))
        width = wider
    modules.append(nn.Flatten())
    x = torch.randn(3, inputs, *[5] * dims, dtype=torch.float64)
    model = nn.Sequential(*modules).double().eval()
    model.append(nn.Linear(model(x).shape[1], 3))
    return settle(model), x, torch.tensor([2, 0, 1])


@few
@given(sequences(), st.sampled_from((Epsilon(1e-6), Epsilon(0.2), ZPlus(), Gamma(0.5))))
def test_sequences_are_explained_as_zennit_does(network, rule):
    model, x, y = network
    composite = LayerMapComposite([*layer_map_base(1e-15), (Linear, rule)])

    scores = score(model, [(x, y)], composite=composite, explain="logit", heatmaps=3)

    heat = zennit_heat_map(model, composite, x, y, SequentialMergeBatchNorm())
    close = {"rtol": 1e-7, "atol": 1e-9 * float(heat.abs().max())}
    torch.testing.assert_close(scores.heatmaps.relevance, heat, **close)
    # weights [out, in / groups, ...], so that each group of outputs has inputs of its own
    weights = scores.relevance["0.weight"].unflatten(0, (getattr(model[0], "groups", 1), -1)).sum(1)
    by_channel = weights.flatten(2).sum(2).flatten() if heat.dim() > 2 else weights.flatten()
    torch.testing.assert_close(by_channel, heat.unsqueeze(-1).flatten(2).sum((0, 2)) / 3, **close)
