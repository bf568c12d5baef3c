"""The nouns in a row, without a Trainer: score, select, allocate, save, load."""

import pytest
import torch
from torch import nn

from lightning_xai_compress import (
    ArtifactError,
    BitAllocation,
    CompressionPlan,
    Mask,
    ScoreMap,
    allocate_bits,
    load_compressed,
    save,
    score,
    select_mask,
)
from lightning_xai_compress.formats import Inputs
from lightning_xai_compress.quantization import quantize


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def test_a_trained_model_is_compressed_in_five_calls(tmp_path):
    model = network()
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(32, 6, generator=generator), torch.arange(32) % 3) for _ in range(4)]

    scores = score(model, batches)
    selection = select_mask(scores, 0.5)
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name].detach() * selection.mask[name] for name in scores.score}
    found = allocate_bits(weights, scores, average_bits=4.0)
    allocation, scales = found.allocation, found.scales
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(quantize(weight, allocation[name], scales[name]))
    (artifact,) = save(model, CompressionPlan(selection.mask, allocation, scales), tmp_path)

    assert artifact.max_abs_diff == 0
    assert scores.samples == 128
    reloaded = load_compressed(artifact.path, network())
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor)
    assert sum(int((reloaded.state_dict()[name] == 0).sum()) for name in weights) >= 72


def test_nouns_refuse_what_does_not_go_together():
    one, two = torch.ones(2, 2), torch.ones(3, 2)
    with pytest.raises(ValueError, match="score and relevance name different parameters"):
        ScoreMap({"a": one}, {"b": one}, {"a": one}, 1)
    with pytest.raises(ValueError, match="sensitivity of a has shape"):
        ScoreMap({"a": one}, {"a": one}, {"a": two}, 1)
    with pytest.raises(ValueError, match="score of a holds infinite values"):
        ScoreMap({"a": one * torch.inf}, {"a": one}, {"a": one}, 1)
    with pytest.raises(ValueError, match="mask of a must be boolean"):
        Mask({"a": one})
    with pytest.raises(ValueError, match=r"bit widths of a must lie in 2\.\.8"):
        BitAllocation({"a": torch.tensor([1, 4])}, {"a": 2})
    with pytest.raises(ValueError, match=r"scales and bit widths name different parameters: \['a'\]"):
        CompressionPlan(Mask({}), None, {"a": torch.ones(2)})


def test_an_old_file_stays_until_the_new_one_is_complete(tmp_path):
    model = network()
    (tmp_path / "model.safetensors").write_bytes(b"old")
    wrong = CompressionPlan(
        Mask({"0.weight": torch.ones(16, 6, dtype=torch.bool)}),
        BitAllocation({"0.weight": torch.full((16,), 2, dtype=torch.uint8)}, {"0.weight": 6}),
        {"0.weight": torch.ones(16)},
    )

    with pytest.raises(ArtifactError, match=r"0\.weight"):
        save(model, wrong, tmp_path)

    assert (tmp_path / "model.safetensors").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


class ThreeWeights(nn.Module):
    """y = 0.5 a - 1 b + 1 c: at (a, b, c) = (1, 2, 3) the shares of y = 1.5 are 0.5, -2 and 3."""

    def __init__(self):
        super().__init__()
        self.sum = nn.Linear(3, 1, bias=False)
        self.sum.weight.data = torch.tensor([[0.5, -1.0, 1.0]])

    def relevance_step(self, batch, batch_idx):
        return self.sum(batch)


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("least", [False, True, True], [False, False, True]),
        ("nonpositive", [True, False, True], [False, False, True]),
    ],
)
def test_a_network_of_three_weights_by_hand(rule, first, second):
    scores = score(ThreeWeights(), [torch.tensor([[1.0, 2.0, 3.0]])], epsilon=0.0)

    assert scores.relevance["sum.weight"].tolist() == [[0.5, -2.0, 3.0]]
    assert scores.sensitivity["sum.weight"].tolist() == [[1.0, 4.0, 9.0]]  # (x c)^2 with c = 1
    assert scores.score["sum.weight"].tolist() == [[0.25, 2.0, 3.0]]  # |R| |w|
    one = select_mask(scores, 1 / 3, selection=rule)
    two = select_mask(scores, 2 / 3, selection=rule, previous=one.mask)
    assert one.mask["sum.weight"].tolist() == [first]
    assert two.mask["sum.weight"].tolist() == [second]


def test_a_module_registered_twice_is_scored_exported_and_left_as_found(tmp_path):
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.BatchNorm1d(8), shared, nn.ReLU(), nn.Linear(8, 3)).eval()
    x, y = torch.randn(6, 8), torch.arange(6) % 3
    model[-1].bias.data.fill_(5.0)  # no logit is negative and left out
    weight = shared.weight

    scores = score(model, [(x, y)], explain="logit", epsilon=0.0)
    plan = CompressionPlan(Mask({"0.weight": torch.ones(8, 8, dtype=torch.bool)}))
    artifacts = save(model, plan, tmp_path, formats=["safetensors", "onnx"], examples=[Inputs((x,))])

    model(x).gather(1, y.unsqueeze(1)).sum().backward()
    torch.testing.assert_close(scores.relevance["0.weight"], weight.grad * weight.detach() / 6)
    assert shared._parameters["weight"] is weight
    assert isinstance(shared._parameters["bias"], nn.Parameter)
    assert all(artifact.max_abs_diff < 1e-4 for artifact in artifacts)
