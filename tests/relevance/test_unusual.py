"""Forward passes that do unusual things: their own autocast, checkpoints, NumPy, writing to the input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_xai_compress import RelevanceError, score


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])


class Mixed(nn.Module):
    """Enters autocast by itself, as some models do."""

    def __init__(self, enabled):
        super().__init__()
        self.enabled = enabled
        self.first, self.mix, self.head = nn.Linear(4, 6), nn.Parameter(torch.eye(6)), nn.Linear(6, 3)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.kinds = []

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            z = F.gelu(self.first(x)) @ self.mix
            z = torch.baddbmm(z.unsqueeze(1), z.unsqueeze(1), self.mix.expand(len(z), 6, 6))
            z = F.scaled_dot_product_attention(z, z, z) + self.conv(z).mean(1, keepdim=True)
            z = torch.addmm(z.squeeze(1), z.squeeze(1), self.mix)
            return self.head(z)


@pytest.mark.parametrize("criterion", ["lrp", "taylor", "wanda"])
def test_autocast_within_the_model_is_off(criterion):
    torch.manual_seed(0)
    model, (x, y) = Mixed(True), batch()

    scores = score(model, [(x.float(), y)], criterion)

    model.enabled = False
    expected = score(model, [(x.float(), y)], criterion)
    for name in expected.score:
        assert torch.equal(scores.score[name], expected.score[name]), name


def test_recurrent_layers_of_a_half_precision_model_run_in_float32():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.head = nn.Linear(4, 6), nn.LSTM(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.rnn(self.embed(x))[0])

    torch.manual_seed(0)
    model, (x, y) = Recurrent().bfloat16(), batch()
    weights = [id(each) for each in model.rnn._flat_weights]

    scores = score(model, [(x.bfloat16(), y)])

    assert [id(each) for each in model.rnn._flat_weights] == weights
    expected = score(model.float(), [(x.bfloat16().float(), y)])
    for name in expected.score:
        assert torch.equal(scores.score[name], expected.score[name])


@pytest.mark.parametrize("composite", ["epsilon", "zplus"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_score_like_others(reentrant, composite):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.checkpoints = True

        def forward(self, x):
            x = F.silu(self.first(x))
            if self.checkpoints:
                return self.head(checkpoint(self.part, x, use_reentrant=reentrant))
            return self.head(self.part(x))

        def part(self, x):
            return F.gelu(self.inner(x))

    torch.manual_seed(0)
    model = Checkpointed().double()
    before = torch.utils.checkpoint._checkpoint_impl

    scores = score(model, [batch()], composite=composite)

    assert torch.utils.checkpoint._checkpoint_impl is before
    model.checkpoints = False
    expected = score(model, [batch()], composite=composite)
    assert scores.unknown == []
    torch.testing.assert_close(scores.relevance, expected.relevance, rtol=0, atol=0)
    torch.testing.assert_close(scores.sensitivity, expected.sensitivity, rtol=0, atol=0)


class Numpy(nn.Module):
    """Reads its input outside of torch, which an input that needs a gradient does not allow."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        scale = float(abs(x.numpy()).max())
        return self.head(F.relu(self.first(x / scale)))


@pytest.mark.parametrize("heatmaps", [0, 3])
def test_models_that_read_their_input_with_numpy_are_scored(heatmaps):
    torch.manual_seed(0)
    model = Numpy().double()
    batches = [batch(1), batch(2)]

    scores = score(model, batches, heatmaps=heatmaps)

    scaled = [(x / x.abs().max(), y) for x, y in batches]
    expected = score(nn.Sequential(model.first, nn.ReLU(), model.head), scaled)
    assert scores.heatmaps is None
    torch.testing.assert_close(scores.relevance["first.weight"], expected.relevance["0.weight"], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("criterion", ["lrp", "deeplift", "wanda"])
@pytest.mark.parametrize("keys", [False, True], ids=["pair", "mapping"])
def test_a_model_that_writes_to_its_input_does_not_write_to_the_users(keys, criterion):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x):
            x.sub_(1.0).div_(2.0)
            return self.fc(x)

    torch.manual_seed(0)
    model = Writes()
    batches = [batch(1), batch(2)]
    copies = [x.clone() for x, _ in batches]

    given = [{"image": x, "label": y} for x, y in batches] if keys else batches
    scores = score(model, given, criterion, baseline=1.0)

    assert all(torch.equal(x, copied) for (x, _), copied in zip(batches, copies, strict=True))
    expected = score(nn.Sequential(model.fc), [((x - 1) / 2, y) for x, y in batches], criterion)
    torch.testing.assert_close(scores.relevance["fc.weight"], expected.relevance["0.weight"], rtol=1e-10, atol=1e-14)


def test_a_lazy_layer_without_a_batch_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(3)).double()

    with pytest.raises(RelevanceError, match=r"1\.weight is of a lazy layer that has not seen a batch: run the model"):
        score(model, [batch()])


def test_products_with_the_input_itself_add_up_over_batches():
    class WithInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.factor, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x * torch.sigmoid(self.gate(x)) + x * self.factor(x))

    torch.manual_seed(0)
    model, (x, y) = WithInput().double(), batch()

    whole, parts = score(model, [(x, y)]), score(model, [(x[:2], y[:2]), (x[2:], y[2:])])

    assert whole.unknown == parts.unknown == ["gate.weight"]
    torch.testing.assert_close(parts.relevance, whole.relevance, rtol=1e-10, atol=1e-14, equal_nan=True)


class NoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.nothing, self.fc = nn.Linear(0, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.nothing(x[:, :0]) + self.fc(x)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_inputs_has_no_weights_to_score():
    scores = score(NoInputs(), [(torch.randn(4, 8), torch.arange(4))])

    assert scores.relevance["nothing.weight"].shape == (4, 0)
    assert not scores.relevance["fc.weight"].isnan().any()
