"""Attention: taken apart it computes the same, and its projections get what AttnLRP and CP-LRP say."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xai_compress import score
from lightning_xai_compress.relevance.attention import multi_head_attention

WIDTH, HEADS, LENGTH, N = 6, 2, 4, 3


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def causal(length, source=None):
    return torch.ones(length, source or length, dtype=torch.bool).triu(1)


PADDING = torch.tensor([[False, False, False, True], [False] * 4, [False, True, False, True]])
FLOATS = tokens(LENGTH, LENGTH, seed=5).masked_fill(causal(LENGTH), -torch.inf)
OPTIONS = {
    "plain": ({}, {}),
    "without bias": ({"bias": False}, {}),
    "batch first": ({"batch_first": True}, {}),
    "other widths of keys and values": ({"kdim": 5, "vdim": 3}, {}),
    "bias of keys and values": ({"add_bias_kv": True}, {}),
    "zero attention": ({"add_zero_attn": True}, {}),
    "both, masked": ({"add_bias_kv": True, "add_zero_attn": True}, {"attn_mask": FLOATS, "key_padding_mask": PADDING}),
    "boolean mask": ({}, {"attn_mask": causal(LENGTH)}),
    "mask of numbers": ({}, {"attn_mask": FLOATS}),
    "mask by head": ({}, {"attn_mask": tokens(N * HEADS, LENGTH, LENGTH, seed=6)}),
    "boolean mask by head": ({}, {"attn_mask": causal(LENGTH).expand(N * HEADS, -1, -1)}),
    "padding": ({}, {"key_padding_mask": PADDING}),
    "padding of numbers": ({}, {"key_padding_mask": tokens(N, LENGTH, seed=7)}),
    "padding and mask": ({"batch_first": True}, {"key_padding_mask": PADDING, "attn_mask": causal(LENGTH)}),
    "causal": ({}, {"attn_mask": causal(LENGTH), "is_causal": True}),
    "causal and padding": ({}, {"attn_mask": causal(LENGTH), "is_causal": True, "key_padding_mask": PADDING}),
}


@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("kind", ["self", "cross", "unbatched"])
@pytest.mark.parametrize(("settings", "call"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rule", ["attnlrp", "cp", None])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_taken_apart_it_computes_what_torch_does(monkeypatch, rule, settings, call, kind, weights):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **settings).eval()
    for bias in (module.in_proj_bias, module.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    shape = (N, LENGTH) if module.batch_first else (LENGTH, N)
    query = tokens(*shape, WIDTH)
    key, value = tokens(*shape, module.kdim, seed=1), tokens(*shape, module.vdim, seed=2)
    if kind == "self" and module.kdim == WIDTH:
        key = value = query
    if kind == "unbatched":
        first = 0 if module.batch_first else (slice(None), 0)
        query, key, value = query[first], key[first], value[first]
        call = {name: each[:1].squeeze(0) if name == "key_padding_mask" else each for name, each in call.items()}
        if "attn_mask" in call and call["attn_mask"].dim() == 3:
            call["attn_mask"] = call["attn_mask"][:HEADS]
    expected, expected_weights = module(query, key, value, **call, **weights)

    apart = functools.partial(multi_head_attention, F.linear, lambda weight, rows: weight[rows], rule)
    monkeypatch.setattr(F, "multi_head_attention_forward", apart)
    output, shown = module(query, key, value, **call, **weights)

    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    if weights == {"need_weights": False}:
        assert shown is None
    else:
        torch.testing.assert_close(shown, expected_weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("padding", [None, PADDING], ids=["unpadded", "padded"])
@pytest.mark.parametrize("mask", [causal(LENGTH), causal(LENGTH).expand(N * HEADS, -1, -1)], ids=["shared", "by head"])
def test_boolean_masks_given_to_the_function_itself_are_understood(mask, padding):
    module = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64)
    query, key = tokens(LENGTH, N, WIDTH), tokens(LENGTH, N, WIDTH, seed=1)
    arguments = (
        query, key, key, WIDTH, HEADS, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
        module.out_proj.weight, module.out_proj.bias, False, padding, True, mask,
    )  # fmt: skip

    output, shown = multi_head_attention(F.linear, lambda weight, rows: weight[rows], "attnlrp", *arguments)

    expected, expected_weights = F.multi_head_attention_forward(*arguments)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(shown, expected_weights, rtol=1e-10, atol=1e-12)


class Packed(nn.Module):
    """nn.MultiheadAttention between an input and a Linear."""

    def __init__(self, mask=None):
        super().__init__()
        self.mask = mask
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.head = nn.Linear(LENGTH * WIDTH, 3)
        self.double()
        self.head.bias.data.fill_(30.0)  # no logit is negative and left out

    def attend(self, x, context):
        return self.attention(x, context, context, attn_mask=self.mask, need_weights=False)[0]

    def forward(self, x, context=None):
        return self.head(self.attend(x, x if context is None else context).flatten(1))


class ByHand(Packed):
    """The same in plain products, with one Linear for each projection."""

    def __init__(self, mask=None):
        super().__init__(mask)
        del self.attention
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH).double() for _ in range(4))

    def load(self, packed):
        with torch.no_grad():
            for index, layer in enumerate([self.q, self.k, self.v]):
                layer.weight.copy_(packed.attention.in_proj_weight.chunk(3)[index])
                layer.bias.copy_(packed.attention.in_proj_bias.chunk(3)[index])
            self.o.load_state_dict(packed.attention.out_proj.state_dict())
            self.head.load_state_dict(packed.head.state_dict())
        return self

    def step(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        if self.mask is not None:
            scores = scores.masked_fill(self.mask, -torch.inf)
        weights = F.dropout(F.softmax(scores, dim=-1), 0.5, self.training)
        return weights @ v

    def attend(self, x, context):
        q, k, v = (
            layer(each).view(len(x), -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer, each in ((self.q, x), (self.k, context), (self.v, context))
        )
        return self.o(self.step(q, k, v).transpose(1, 2).flatten(2))


class Kernel(ByHand):
    """The same with the fused kernel."""

    def step(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, None if self.mask is None else ~self.mask)


class Einsum(ByHand):
    """The same in Einstein's notation."""

    def step(self, q, k, v):
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
        if self.mask is not None:
            scores = scores.masked_fill(self.mask, -torch.inf)
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def relevance_by_hand(model, x, context, y, rule):
    """Relevance of the four projections, with every message written out (Achtibat et al. 2024, eq. 13 and 15)."""
    expected = {name: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for name in "qkvo"}
    size = WIDTH // HEADS
    layers = {name: (getattr(model, name).weight.detach(), getattr(model, name).bias.detach()) for name in "qkvo"}

    def linear(name, inputs):
        return inputs @ layers[name][0].T + layers[name][1]

    def back(name, inputs, outputs, relevance):
        messages = inputs.unsqueeze(1) * layers[name][0] * (relevance / outputs).unsqueeze(2)
        expected[name] += messages.sum(0) / len(x)
        return messages.sum(1)

    for sample, source, label in zip(x, context, y.tolist(), strict=True):
        q, k, v = linear("q", sample), linear("k", source), linear("v", source)
        o = torch.zeros_like(q)
        kept = []
        for head in range(HEADS):
            at = slice(head * size, (head + 1) * size)
            s = q[:, at] @ k[:, at].T / math.sqrt(size)
            s = s if model.mask is None else s.masked_fill(model.mask, -torch.inf)
            a = s.softmax(1)
            o[:, at] = a @ v[:, at]
            kept.append((at, s, a))
        out = linear("o", o)
        relevance = back("o", o, out, out * model.head.weight.detach()[label].view_as(out))
        r = {name: torch.zeros_like(each) for name, each in zip("qkv", (q, k, v), strict=True)}
        for at, s, a in kept:
            ratio = relevance[:, at] / o[:, at]
            messages = a.unsqueeze(2) * v[:, at].unsqueeze(0) * ratio.unsqueeze(1)  # [query, key, width]
            if rule == "cp":
                r["v"][:, at] = messages.sum(0)
                continue
            r["v"][:, at] = messages.sum(0) / 2
            to_weights = messages.sum(2) / 2
            to_scores = torch.where(a == 0, 0.0, s * (to_weights - a * to_weights.sum(1, keepdim=True)))
            share = torch.where(a == 0, 0.0, to_scores / s) / math.sqrt(size)
            messages = q[:, at].unsqueeze(1) * k[:, at].unsqueeze(0) * share.unsqueeze(2)
            r["q"][:, at] = messages.sum(1) / 2
            r["k"][:, at] = messages.sum(0) / 2
        for name, inputs, outputs in (("q", sample, q), ("k", source, k), ("v", source, v)):
            if r[name].any():
                back(name, inputs, outputs, r[name])
    return expected


def projections(model, tensors):
    if isinstance(model, ByHand):
        return {name: tensors[f"{name}.weight"] for name in "qkvo"}
    each = [*tensors["attention.in_proj_weight"].chunk(3), tensors["attention.out_proj.weight"]]
    return dict(zip("qkvo", each, strict=True))


@pytest.mark.parametrize("mask", [None, causal(LENGTH)], ids=["unmasked", "causal"])
@pytest.mark.parametrize("across", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("rule", ["attnlrp", "cp"])
@pytest.mark.parametrize("kind", [Packed, ByHand, Kernel, Einsum])
def test_projections_get_the_relevance_of_the_definition(kind, rule, across, mask):
    packed = Packed(mask)
    plain = ByHand(mask).load(packed)
    model = packed if kind is Packed else kind(mask).load(packed)
    x, y = tokens(N, LENGTH, WIDTH), torch.tensor([0, 2, 1])
    context = tokens(N, LENGTH, WIDTH, seed=1) if across else x

    scores = score(
        model,
        [((x, context) if across else x, y)],
        explain="logit",
        epsilon=0.0,
        attention=rule,
        statistics=("absolute",),
    )

    found, expected = projections(model, scores.relevance), relevance_by_hand(plain, x, context, y, rule)
    absolute = projections(model, scores.absolute)
    for name in "qkvo":
        if rule == "cp" and name in "qk":
            assert found[name].isnan().all(), name
            assert absolute[name].isnan().all(), name
        else:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-13, msg=name)
            assert expected[name].abs().max() > 1e-4
            assert (absolute[name] >= found[name].abs() - 1e-12).all()


@pytest.mark.parametrize("across", [False, True], ids=["self", "cross"])
def test_packed_projections_score_like_three_layers(across):
    packed = Packed()
    plain = ByHand().load(packed)
    x, y = tokens(N, LENGTH, WIDTH), torch.tensor([0, 2, 1])
    inputs = (x, tokens(N, LENGTH, WIDTH, seed=1)) if across else x

    results = [score(model, [(inputs, y)], statistics=("rms", "absolute"), epsilon=0.1) for model in (packed, plain)]

    for kind in ("relevance", "sensitivity", "absolute", "score"):
        found, expected = (projections(m, getattr(r, kind)) for m, r in zip((packed, plain), results, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("settings", [{}, {"kdim": 5, "vdim": 3}, {"add_bias_kv": True}], ids=str)
def test_gradient_criteria_get_the_ordinary_gradient_of_packed_projections(settings):
    class Across(Packed):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64, **settings)

        def forward(self, x, key, value):
            return self.head(self.attention(x, key, value)[0].flatten(1))

    model = Across()
    inputs = tuple(
        tokens(N, LENGTH, settings.get(dim, WIDTH), seed=i) for i, dim in enumerate(["qdim", "kdim", "vdim"])
    )
    y = torch.tensor([0, 2, 1])

    scores = score(model, [(inputs, y)], "taylor", explain="logit")

    model(*inputs).gather(1, y.unsqueeze(1)).sum().backward()
    expected = {name: p.grad * p.detach() / N for name, p in model.named_parameters() if name in scores.relevance}
    assert len(expected) == (5 if "kdim" in settings else 3)
    torch.testing.assert_close(scores.relevance, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("rule", ["attnlrp", "cp"])
def test_queries_and_keys_in_one_layer_with_the_values_are_unknown_by_rows(rule):
    class Fused(ByHand):
        def attend(self, x, context):
            q, k, v = self.qkv(x).view(len(x), -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
            return self.o(self.step(q, k, v).transpose(1, 2).flatten(2))

    plain = ByHand().load(Packed())
    model = Fused().load(Packed())
    model.load_state_dict(plain.state_dict())
    model.qkv = nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.float64)
    model.qkv.weight.data = torch.cat([layer.weight.detach() for layer in (plain.q, plain.k, plain.v)])
    model.qkv.bias.data = torch.cat([layer.bias.detach() for layer in (plain.q, plain.k, plain.v)])
    x, y = tokens(N, LENGTH, WIDTH), torch.tensor([0, 2, 1])

    fused, apart = (score(each, [(x, y)], attention=rule) for each in (model, plain))

    expected = torch.cat([apart.score[f"{name}.weight"] for name in "qkv"])
    torch.testing.assert_close(fused.score["qkv.weight"], expected, rtol=1e-9, atol=1e-14, equal_nan=True)
    assert expected.isnan().any() == (rule == "cp")
    listed = {each.name: each.reason for each in fused.skipped}
    assert ("qkv.weight" in listed) == (rule == "cp")
    assert rule != "cp" or f"unknown for {2 * WIDTH} of {3 * WIDTH} rows" in listed["qkv.weight"]


class Encoder(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True, **settings)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
        self.head = nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, x, padding):
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])


@pytest.mark.parametrize("settings", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_the_encoder_is_left_so_that_all_weights_are_known(settings):
    model = Encoder(**settings).eval()
    x, y = tokens(N, LENGTH, WIDTH), torch.tensor([0, 2, 1])
    with torch.no_grad():
        model(x, PADDING)  # takes the fast path
        scores = score(model, [((x, PADDING), y)])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = score(model, [((x, PADDING), y)])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)

    assert scores.unknown == []
    assert len(scores.score) == 2 * 4 + 1
    assert not any(each.isnan().any() for each in scores.score.values())
    torch.testing.assert_close(scores.relevance, expected.relevance, rtol=1e-12, atol=1e-15)
