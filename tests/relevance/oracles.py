"""What relevance is compared with: zennit's heat map, and messages R_ij as the definitions say them, slow and plain."""

import copy

import torch
import torch.nn.functional as F
from torch import nn


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-10 * float(expected.abs().max()))


def zennit_heat_map(model, composite, x, y, *canonizers):
    """R of the input, from the true logit; of a copy, for canonizers change the model."""
    composite.canonizers = list(canonizers)
    x = x.clone().requires_grad_()
    with composite.context(copy.deepcopy(model)) as modified:
        output = modified(x)
        start = torch.zeros_like(output).scatter(1, y.unsqueeze(1), output.detach().gather(1, y.unsqueeze(1)))
        (heat,) = torch.autograd.grad(output, x, start)
    return heat


# a rule gives the messages [out, in] of one output position: x [in], w [out, in], b [out], r [out]; all of these follow
# Montavon et al. 2019 (table 1) and 2017, for inputs of both signs as zennit documents it


def stabilized(z, epsilon=1e-6):
    return z + epsilon * torch.where(z < 0, -1.0, 1.0)


def epsilon(x, w, b, r, epsilon=1e-6):
    return x * w * (r / stabilized(w @ x + b, epsilon)).unsqueeze(1)


def alpha_beta(x, w, b, r, alpha=2.0, beta=1.0):
    z = x * w
    positive, negative = z.clamp(min=0), z.clamp(max=0)
    up = r / stabilized(positive.sum(1) + b.clamp(min=0))
    down = r / stabilized(negative.sum(1) + b.clamp(max=0))
    return alpha * positive * up.unsqueeze(1) - beta * negative * down.unsqueeze(1)


def zplus(x, w, b, r):
    return alpha_beta(x, w, b, r, 1.0, 0.0)


def gamma(x, w, b, r, gamma=0.25):
    """Contributions of the output's own sign count 1 + gamma times."""
    messages = torch.zeros_like(w)
    for j in range(len(w)):
        out = w[j] @ x + b[j]
        favoured = x * w[j] > 0 if out > 0 else x * w[j] < 0
        z = x * w[j] * (1 + gamma * favoured.to(w))
        own = b[j] * (1 + gamma) if b[j] * out > 0 else b[j]
        messages[j] = z * r[j] * (out != 0) / stabilized(z.sum() + own)
    return messages


def flat(x, w, b, r):
    return torch.ones_like(w) * (r / stabilized(torch.ones_like(w).sum(1))).unsqueeze(1)


def wsquare(x, w, b, r):
    return w**2 * (r / stabilized((w**2).sum(1) + b**2)).unsqueeze(1)


def zbox(x, w, b, r, low=-4.0, high=4.0):
    z = x * w - low * w.clamp(min=0) - high * w.clamp(max=0)
    return z * (r / stabilized(z.sum(1) + b - b.clamp(min=0) - b.clamp(max=0))).unsqueeze(1)


IGNORE_PADDING = (flat, wsquare, zbox)  # rules that would give relevance to the zeros of a padding


def seen(layer, shape):
    """Which input values (counted from 1; 0 is padding) each output position sees: [groups, positions, taps]."""
    numbers = torch.arange(1.0, torch.Size(shape).numel() + 1, dtype=torch.float64).view(shape)
    if isinstance(layer, nn.Linear):
        return numbers.view(1, -1, shape[-1]).long()
    columns = F.unfold(numbers.unsqueeze(0), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.view(layer.groups, -1, columns.shape[-1]).transpose(1, 2).long()


def through_layer(layer, rule, x, r):
    """Messages of one sample [positions, *weight.shape], and R of its input."""
    places = seen(layer, x.shape)
    groups, positions, _ = places.shape
    values = torch.cat([x.new_zeros(1), x.flatten()])
    w = layer.weight.detach().flatten(1).chunk(groups)
    b = (torch.zeros(len(layer.weight), dtype=x.dtype) if layer.bias is None else layer.bias.detach()).chunk(groups)
    r = (r.reshape(positions, -1) if isinstance(layer, nn.Linear) else r.flatten(1).T).chunk(groups, 1)
    below = torch.zeros_like(values)
    messages = []
    for p in range(positions):
        of_groups = []
        for g in range(groups):
            place = places[g, p]
            there = place > 0 if rule in IGNORE_PADDING else torch.ones_like(place, dtype=torch.bool)
            message = torch.zeros_like(w[g])
            message[:, there] = rule(values[place][there], w[g][:, there], b[g], r[g][p])
            below.index_add_(0, place, message.sum(0))
            of_groups.append(message)
        messages.append(torch.cat(of_groups).view_as(layer.weight))
    return torch.stack(messages), below[1:].view_as(x)


def lrp(model, rules, x, label):
    """Messages of each layer of a Sequential, by parameter name, and the heat map of one sample.

    Args:
        rules: The rule of each layer with weights, by its number.
    """
    inputs = [x.unsqueeze(0)]
    for layer in model:
        inputs.append(layer(inputs[-1]).detach())
    r = torch.zeros_like(inputs[-1][0])
    r[label] = inputs[-1][0, label]
    messages = {}
    for number in reversed(range(len(model))):
        layer, x, z = model[number], inputs[number], inputs[number + 1]
        if isinstance(layer, nn.Linear | nn.Conv2d):
            messages[f"{number}.weight"], r = through_layer(layer, rules[number], x[0], r)
        elif isinstance(layer, nn.AvgPool2d | nn.MaxPool2d):
            leaf = x.clone().requires_grad_()
            share = torch.where(z == 0, 0.0, r / z)
            r = (x * torch.autograd.grad(layer(leaf), leaf, share)[0])[0]
        else:
            r = r.view_as(x[0])
    return messages, r
