"""Activations, normalizations and products against the papers' definitions, written out as relevance R of each neuron.

With a = M z + shift, M held constant, relevance passes as R_z = z * (M^T (R_a / a)); a layer with one input and output
per neuron passes all of it, R_z = R_a.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xai_compress import score

N, WIDTH = 5, 6


class Between(nn.Module):
    """A Linear, some operation on its output, a Linear."""

    def __init__(self, operation, width=WIDTH, out=None):
        super().__init__()
        self.first, self.operation = nn.Linear(3, width), operation
        self.second = nn.Linear(width if out is None else out, 2)
        self.double().eval()
        self.second.bias.data.fill_(30.0)  # no logit is negative and left out

    def forward(self, x):
        return self.second(self.operation(self.first(x)).flatten(1))


def batch():
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(N, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])


def relevance_of_inputs_of_second(model, y, a):
    """R_a = a w R_y / z_y with R_y = z_y."""
    return a * model.second.weight.detach()[y]


def relevance_of_first(model, x, relevance):
    """R_ij = x_j w_ij R_i / z_i, mean over samples."""
    z = model.first(x).detach()
    expected = torch.zeros_like(model.first.weight)
    for sample in range(len(x)):
        for i in range(z.shape[1]):
            for j in range(3):
                share = x[sample, j] * model.first.weight.detach()[i, j] / z[sample, i]
                expected[i, j] += share * relevance[sample, i] / len(x)
    return expected


def assert_relevance(model, expected, x, y):
    scores = score(model, [(x, y)], explain="logit", epsilon=0.0)

    torch.testing.assert_close(scores.relevance["first.weight"], expected, rtol=1e-9, atol=1e-13)
    assert expected.abs().max() > 1e-3


def ignoring_the_result(module):
    def operation(z):
        module(z)
        return z

    return operation


def tanh_gelu(z):
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


ACTIVATIONS = {
    "GELU": nn.GELU(), "F.gelu": F.gelu, "GELU tanh": nn.GELU("tanh"),
    "GELU tanh written out": tanh_gelu,
    "GELU written out": lambda z: z * 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0))),
    "SiLU": nn.SiLU(), "F.silu": F.silu, "SiLU written out": lambda z: z * torch.sigmoid(z),
    "quick GELU": lambda z: z * torch.sigmoid(1.702 * z), "swish method": lambda z: z.sigmoid() * z,
    "Hardswish": nn.Hardswish(), "F.hardswish": F.hardswish, "Hardswish written out": lambda z: z * F.hardsigmoid(z),
    "ReLU6": nn.ReLU6(), "F.relu6": F.relu6, "Hardtanh": nn.Hardtanh(-2, 2), "F.hardtanh": F.hardtanh,
    "ELU": nn.ELU(0.5), "F.elu": F.elu, "SELU": nn.SELU(), "torch.selu": torch.selu, "CELU": nn.CELU(2.0),
    "torch.celu": torch.celu,
    "Mish": nn.Mish(), "Softplus": nn.Softplus(2.0), "Softsign": nn.Softsign(), "LogSigmoid": nn.LogSigmoid(),
    "Tanhshrink": nn.Tanhshrink(), "Softshrink": nn.Softshrink(0.2), "Hardshrink": nn.Hardshrink(0.2),
    "Tanh": nn.Tanh(), "torch.tanh": torch.tanh, "tanh method": lambda z: z.tanh(), "F.tanh": F.tanh,
    "Sigmoid": nn.Sigmoid(), "torch.sigmoid": torch.sigmoid, "sigmoid method": lambda z: z.sigmoid(),
    "expit": torch.special.expit, "Hardsigmoid": nn.Hardsigmoid(),
}  # fmt: skip
IN_PLACE = {
    "SiLU": nn.SiLU(True), "Mish": nn.Mish(True), "Hardswish": nn.Hardswish(True), "ReLU6": nn.ReLU6(True),
    "Hardtanh": nn.Hardtanh(-1, 1, inplace=True), "ELU": nn.ELU(0.5, True), "SELU": nn.SELU(True),
    "CELU": nn.CELU(2.0, True), "Hardsigmoid": nn.Hardsigmoid(True), "tanh_": lambda z: z.tanh_(),
    "torch.tanh_": torch.tanh_, "sigmoid_": lambda z: z.sigmoid_(), "elu_": F.elu_, "hardtanh_": F.hardtanh_,
    "selu_": torch.selu_, "celu_": torch.celu_, "F.silu": lambda z: F.silu(z, inplace=True),
    "of a view": lambda z: F.silu(z.view(-1), inplace=True),
}  # fmt: skip


@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_an_activation_passes_all_relevance_of_its_output(function):
    model, (x, y) = Between(function), batch()

    a = function(model.first(x)).detach()

    assert_relevance(model, relevance_of_first(model, x, relevance_of_inputs_of_second(model, y, a)), x, y)


@pytest.mark.parametrize("use", [lambda module: module, ignoring_the_result], ids=["result used", "result ignored"])
@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)
def test_an_activation_in_place_passes_all_relevance_of_its_output(function, use):
    operation = use(function)
    model, (x, y) = Between(lambda z: operation(z).view_as(z)), batch()

    with torch.no_grad():
        a = model.operation(model.first(x))

    assert_relevance(model, relevance_of_first(model, x, relevance_of_inputs_of_second(model, y, a)), x, y)


def standardizing(groups, eps):
    """The matrix of (z - mean) / std within each group of entries of a flat z, with std a constant."""

    def matrix(z):
        result = torch.zeros(len(z), len(z), dtype=z.dtype)
        for group in groups:
            n = len(group)
            mean = sum(z[i] for i in group) / n
            std = (sum((z[i] - mean) ** 2 for i in group) / n + eps).sqrt()
            for i in group:
                for j in group:
                    result[i, j] = ((1.0 if i == j else 0.0) - 1 / n) / std
        return result

    return matrix


def dividing(groups, size):
    """The matrix of z / size(z) within each group, with the size a constant."""

    def matrix(z):
        result = torch.zeros(len(z), len(z), dtype=z.dtype)
        for group in groups:
            for i in group:
                result[i, i] = 1 / size(z[group])
        return result

    return matrix


class Wide(nn.Module):
    """Gives what the module inside expects: 6 features as 2 x 3, or as they are."""

    def __init__(self, module, *shape):
        super().__init__()
        self.module, self.shape = module, shape

    def forward(self, z):
        return self.module(z.view(len(z), *self.shape))


def rms_by_hand(z):
    return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-5)


def per_sample(*groups):
    return [[n * WIDTH + i for i in group] for n in range(N) for group in groups]


def rms(z):
    return (z.square().mean() + 1e-5).sqrt()


ALL, HALVES, ODD = range(6), (range(3), range(3, 6)), ([0, 3], [1, 4], [2, 5])
BATCH = [[n * WIDTH + i for n in range(N)] for i in range(WIDTH)]
NORMALIZATIONS = {
    "LayerNorm": (nn.LayerNorm(6), standardizing(per_sample(ALL), 1e-5)),
    "LayerNorm without parameters": (nn.LayerNorm(6, 0.1, False), standardizing(per_sample(ALL), 0.1)),
    "LayerNorm of the last axis": (Wide(nn.LayerNorm(3), 2, 3), standardizing(per_sample(*HALVES), 1e-5)),
    "LayerNorm of two axes": (Wide(nn.LayerNorm([2, 3]), 2, 3), standardizing(per_sample(ALL), 1e-5)),
    "F.layer_norm by name": (
        lambda z: F.layer_norm(z, normalized_shape=(6,), eps=1e-3), standardizing(per_sample(ALL), 1e-3)),
    "LayerNorm written out": (
        lambda z: (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, correction=0) + 1e-5).sqrt(),
        standardizing(per_sample(ALL), 1e-5)),
    "GroupNorm": (nn.GroupNorm(2, 6), standardizing(per_sample(*HALVES), 1e-5)),
    "GroupNorm of positions": (Wide(nn.GroupNorm(1, 2), 2, 3), standardizing(per_sample(ALL), 1e-5)),
    "F.group_norm by name": (
        lambda z: F.group_norm(z, num_groups=2, eps=0.1), standardizing(per_sample(*HALVES), 0.1)),
    "InstanceNorm": (Wide(nn.InstanceNorm1d(2, affine=True), 2, 3), standardizing(per_sample(*HALVES), 1e-5)),
    "BatchNorm without running statistics": (
        nn.BatchNorm1d(6, track_running_stats=False), standardizing(BATCH, 1e-5)),
    "RMSNorm": (nn.RMSNorm(6, eps=1e-5), dividing(per_sample(ALL), rms)),
    "RMSNorm written out": (rms_by_hand, dividing(per_sample(ALL), rms)),
    "RMSNorm by a power": (
        lambda z: z * (z.pow(2).mean(-1, keepdim=True) + 1e-5) ** -0.5, dividing(per_sample(ALL), rms)),
    "normalize": (F.normalize, dividing(per_sample(ALL), lambda z: z.norm())),
    "normalize by the sum": (
        lambda z: F.normalize(z, p=1.0, dim=-1), dividing(per_sample(ALL), lambda z: z.abs().sum())),
    "division by a norm": (
        lambda z: z / z.norm(dim=1, keepdim=True), dividing(per_sample(ALL), lambda z: z.norm())),
    "times one over a norm": (
        lambda z: z * (1 / z.norm(dim=1, keepdim=True)), dividing(per_sample(ALL), lambda z: z.norm())),
}  # fmt: skip


@pytest.mark.parametrize(("operation", "matrix"), NORMALIZATIONS.values(), ids=NORMALIZATIONS)
def test_a_normalization_is_linear_with_its_deviation_held(operation, matrix):
    """Ali et al. 2022, eq. 8."""
    torch.manual_seed(0)
    model, (x, y) = Between(operation), batch()
    for parameter in (p for name, p in model.named_parameters() if name.startswith("operation")):
        nn.init.normal_(parameter)
    z = model.first(x).detach()
    a = model.operation(z).detach().flatten(1)
    share = relevance_of_inputs_of_second(model, y, a) / a
    # a = gain M z + shift, where neither depends on z: a probe with zeros finds the shift
    shift = model.operation(torch.zeros_like(z)).detach().flatten(1).nan_to_num(0.0)
    gain = (a - shift) / (matrix(z.flatten()) @ z.flatten()).view(N, -1)
    below = matrix(z.flatten()).T @ (gain * share).flatten()

    assert_relevance(model, relevance_of_first(model, x, z * below.view(N, WIDTH)), x, y)


def gated_by(function, view=lambda g: g):
    return lambda z: z[:, :3] * view(function(z[:, 3:]))


GATES = {
    "sigmoid": (gated_by(torch.sigmoid), torch.sigmoid),
    "sigmoid first": (lambda z: z[:, 3:].sigmoid() * z[:, :3], torch.sigmoid),
    "Hardsigmoid in place": (gated_by(lambda z: F.hardsigmoid(z.clone(), inplace=True)), F.hardsigmoid),
    "viewed and expanded": (
        gated_by(torch.sigmoid, lambda g: g.view(-1, 3, 1).expand(-1, 3, 2)[..., 0].contiguous()), torch.sigmoid),
    "one minus a gate": (gated_by(lambda g: 1 - torch.sigmoid(g)), lambda g: torch.sigmoid(-g)),
    "twice a gate": (gated_by(lambda g: 2 * torch.sigmoid(g)), lambda g: 2 * torch.sigmoid(g)),
    "in place": (lambda z: z[:, :3].clone().mul_(torch.sigmoid(z[:, 3:])), torch.sigmoid),
    "*=": (lambda z: z[:, :3].clone().__imul__(torch.sigmoid(z[:, 3:])), torch.sigmoid),
    "F.glu": (F.glu, torch.sigmoid),
    "GLU": (nn.GLU(), torch.sigmoid),
    "quotient": (lambda z: z[:, :3] / (1 + z[:, 3:].exp()), lambda g: 1 / (1 + g.exp())),
    "quotient in place": (lambda z: z[:, :3].clone().div_(1 + z[:, 3:].exp()), lambda g: 1 / (1 + g.exp())),
}  # fmt: skip


@pytest.mark.parametrize(("operation", "gate"), GATES.values(), ids=GATES)
def test_a_gate_gets_nothing_and_the_signal_all(operation, gate):
    model, (x, y) = Between(operation, out=3), batch()
    z = model.first(x).detach()

    relevance = relevance_of_inputs_of_second(model, y, z[:, :3] * gate(z[:, 3:]))

    expected = relevance_of_first(model, x, torch.cat([relevance, torch.zeros_like(relevance)], 1))
    assert_relevance(model, expected, x, y)


def outer_by_hand(z, relevance):
    """a_ij = u_i v_j: half of R_ij to each."""
    shares = relevance.view(N, 3, 3) / 2
    return torch.cat([shares.sum(2), shares.sum(1)], 1)


def inner_by_hand(z, relevance):
    """a = sum_i u_i v_i: messages u_i v_i R / a, half of each to u_i and v_i."""
    products = z[:, :3] * z[:, 3:]
    shares = products / products.sum(1, keepdim=True) * relevance / 2
    return torch.cat([shares, shares], 1)


def column(z):
    return z.unsqueeze(2)


PRODUCTS = {
    "SwiGLU": (lambda z: F.silu(z[:, :3]) * z[:, 3:], 3, lambda z, r: torch.cat([r, r], 1) / 2),
    "product in place": (lambda z: z[:, :3].clone().mul_(z[:, 3:]), 3, lambda z, r: torch.cat([r, r], 1) / 2),
    "torch.mul": (lambda z: torch.mul(z[:, :3], other=z[:, 3:]), 3, lambda z, r: torch.cat([r, r], 1) / 2),
    "x * x": (lambda z: z * z, 6, lambda z, r: r),
    "outer product": (lambda z: column(z[:, :3]) @ column(z[:, 3:]).mT, 9, outer_by_hand),
    "einsum": (lambda z: torch.einsum("ni,nj->nij", z[:, :3], z[:, 3:]), 9, outer_by_hand),
    "einsum of a list": (lambda z: torch.einsum("ni,nj->nij", [z[:, :3], z[:, 3:]]), 9, outer_by_hand),
    "bmm": (lambda z: torch.bmm(column(z[:, :3]).mT, column(z[:, 3:])), 1, inner_by_hand),
    "matmul": (lambda z: torch.matmul(column(z[:, :3]).mT, column(z[:, 3:])), 1, inner_by_hand),
    "baddbmm": (
        lambda z: torch.baddbmm(z.new_zeros(1), column(z[:, :3]).mT, column(z[:, 3:])), 1, inner_by_hand),
    "einsum of three": (
        lambda z: torch.einsum("ni,ni,ni->ni", z[:, :2], z[:, 2:4], z[:, 4:]), 2,
        lambda z, r: torch.cat([r, r, r], 1) / 3),
}  # fmt: skip


@pytest.mark.parametrize(("operation", "out", "by_hand"), PRODUCTS.values(), ids=PRODUCTS)
def test_factors_of_a_product_get_equal_shares(operation, out, by_hand):
    """Achtibat et al. 2024, eq. 15."""
    model, (x, y) = Between(operation, out=out), batch()
    z = model.first(x).detach()
    a = operation(z).flatten(1)

    relevance = by_hand(z, relevance_of_inputs_of_second(model, y, a))

    assert_relevance(model, relevance_of_first(model, x, relevance), x, y)


def test_a_weight_used_in_a_handwritten_product_is_no_activation():
    class ByHand(Between):
        def forward(self, x):
            return self.second((self.first(x) @ (2 * self.extra.weight).mT).flatten(1))

    model, (x, y) = ByHand(None), batch()
    model.extra = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    scores = score(model, [(x, y)], explain="logit", epsilon=0.0)

    z = model.first(x).detach()
    share = model.second.weight.detach()[y] @ (2 * model.extra.weight.detach())  # no halves
    expected = relevance_of_first(model, x, z * share)
    torch.testing.assert_close(scores.relevance["first.weight"], expected, rtol=1e-9, atol=1e-13)
    assert scores.unknown == ["extra.weight"]
