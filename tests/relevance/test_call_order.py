"""In which order a model meets its weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.relevance import call_order


class Tangled(nn.Module):
    """Registered backwards, called functionally, used twice, tied, and with attention."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8, bias=False)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.twice.weight
        self.unused = nn.Linear(2, 2)
        self.embed = nn.Embedding(5, 8)

    def forward(self, tokens):
        assert self.unused.weight.shape == (2, 2)  # to look is no use
        x = F.embedding(tokens, self.embed.weight)
        x = self.twice(self.twice(x))
        x = self.attention(x, x, x)[0]
        return F.linear(self.again(x).mean(1), self.head.weight, self.head.bias)


def test_weights_are_met_in_the_order_of_the_calls():
    torch.manual_seed(0)
    model = Tangled().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    order = call_order(model, (torch.tensor([[0, 1, 2]]), torch.tensor([1])))

    weights = [name for name in order if name.endswith("weight")]
    assert weights == [
        "embed.weight", "twice.weight", "twice.weight", "attention.in_proj_weight", "attention.out_proj.weight",
        "twice.weight", "head.weight",
    ]  # fmt: skip
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_batch_that_is_not_understood_is_an_error():
    with pytest.raises(RelevanceError, match="input and target of a batch were not found"):
        call_order(Tangled(), torch.tensor([[0, 1, 2]]))
