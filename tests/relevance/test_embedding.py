"""Embeddings: relevance per row, from every occurrence of its token."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xai_compress import score


class Tokens(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.embed = nn.Embedding(7, 4, dtype=torch.float64, **settings)
        self.fc = nn.Linear(4, 3, dtype=torch.float64)
        self.fc.bias.data.fill_(30.0)

    def forward(self, tokens):
        return self.fc(F.leaky_relu(self.embed(tokens), 0.5).mean(1))


TOKENS = torch.tensor([[1, 1, 4, 2], [4, 6, 1, 0], [2, 2, 2, 2]])  # 3 and 5 do not occur


@pytest.mark.parametrize("settings", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embeddings_get_the_relevance_of_each_occurrence_and_unseen_rows_are_unknown(settings):
    model, y = Tokens(**settings), torch.tensor([0, 1, 2])
    if "padding_idx" in settings:
        model.embed.weight.data[0] = 0.5  # such a row need not be zero

    scores = score(model, [(TOKENS, y)], explain="logit", epsilon=0.0, statistics=("rms", "absolute", "positive"))

    weight = model.embed.weight.detach()
    signed, squares, absolute, positive = (torch.zeros_like(weight) for _ in range(4))
    for tokens, label in zip(TOKENS.tolist(), y.tolist(), strict=True):
        for token in tokens:
            r = F.leaky_relu(weight[token], 0.5) * model.fc.weight.detach()[label] / 4
            signed[token] += r / 3
            squares[token] += r.square() / 3
            absolute[token] += r.abs() / 3
            positive[token] += r.clamp(min=0) / 3
    seen = [0, 1, 2, 4, 6]
    name = "embed.weight"
    kinds = {"relevance": signed, "rms": squares.sqrt(), "absolute": absolute, "positive": positive}
    for kind, expected in kinds.items():
        found = getattr(scores, kind)
        torch.testing.assert_close(found[name][seen], expected[seen], rtol=1e-9, atol=1e-14)
        assert found[name][[3, 5]].isnan().all()
    assert scores.score[name][[3, 5]].isnan().all()


def test_fisher_of_an_embedding_squares_the_sum_over_a_sample():
    model, y = Tokens(), torch.tensor([0, 1, 2])

    scores = score(model, [(TOKENS, y)], "fisher", explain="logit")

    expected = torch.zeros_like(model.embed.weight)
    for tokens, label in zip(TOKENS, y.tolist(), strict=True):
        (gradient,) = torch.autograd.grad(model(tokens.unsqueeze(0))[0, label], model.embed.weight)
        expected += gradient.square() / 3
    seen = [0, 1, 2, 4, 6]
    torch.testing.assert_close(scores.sensitivity["embed.weight"][seen], expected[seen], rtol=1e-9, atol=1e-14)


def test_an_embedding_that_renormalizes_its_rows_leaves_the_users_alone():
    model, y = Tokens(max_norm=0.5), torch.tensor([0, 1, 2])
    before, version = model.embed.weight.detach().clone(), model.embed.weight._version

    scores = score(model, [(TOKENS, y)], explain="logit", epsilon=0.0)

    assert torch.equal(model.embed.weight, before)
    assert model.embed.weight._version == version
    plain = Tokens()
    plain.load_state_dict(model.state_dict())
    plain.embed.weight.data = before * (0.5 / before.norm(dim=1, keepdim=True)).clamp(max=1)
    expected = score(plain, [(TOKENS, y)], explain="logit", epsilon=0.0).relevance["embed.weight"]
    torch.testing.assert_close(scores.relevance["embed.weight"], expected, rtol=1e-6, atol=1e-14, equal_nan=True)


def test_which_layers_are_scored_does_not_change_their_relevance():
    class Attending(Tokens):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.gate = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(4))

        def forward(self, tokens):
            x = self.embed(tokens)
            x = x + (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
            return self.fc((x * torch.sigmoid(self.gate(x))).mean(1))

    torch.manual_seed(0)
    model, batch = Attending(), (TOKENS, torch.tensor([0, 1, 2]))
    together = score(model, [batch])

    assert together.unknown == ["gate.weight"]
    for name in set(together.score) - {"gate.weight"}:
        alone = score(model, [batch], layers=[name])
        torch.testing.assert_close(alone.relevance[name], together.relevance[name], rtol=0, atol=0, equal_nan=True)
