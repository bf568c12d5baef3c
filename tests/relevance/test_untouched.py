"""A scoring pass leaves no trace: not in the model, not in the process, and not in memory, whatever happens in it."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xai_compress import score
from lightning_xai_compress.relevance import isolated


class Net(nn.Module):
    """Does in its forward pass all that leaves traces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", None)
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.5)
        self.drop, self.rnn = nn.Dropout(0.5), nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, 3)
        self.count, self.seen, self.maps, self.names = 0, [], {"first": None}, {"a"}
        self.last = None
        self.during = lambda: None

    def forward(self, x):
        self.calls += 1
        self.cache = torch.ones(3)
        self.register_buffer("lazy", torch.ones(2), persistent=True)
        self.count += 1
        self.drop.train()
        self.norm.train()
        z = self.first(x)
        self.last = z
        self.extra = z.mean()
        self.seen.append(z)
        self.maps["first"] = z
        self.names.add("b")
        z = F.relu(self.norm(z))
        z = self.drop(z + torch.rand_like(z))
        self.during()
        self.head.register_forward_hook(lambda *_: None)
        return self.head(self.rnn(z.unsqueeze(1))[0].squeeze(1))


def build():
    torch.manual_seed(0)
    model = Net().double().train()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    model.first.weight.grad = torch.ones_like(model.first.weight)
    model.head.register_forward_hook(lambda *_: None)
    return model


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])


def everything(model):
    """All that can be seen of a model and of the state of torch, as plain values."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": [(n, id(t), t._version, t.requires_grad, t.tolist()) for n, t in tensors],
        "gradients": [
            (n, id(p.grad), None if p.grad is None else p.grad.tolist()) for n, p in model.named_parameters()
        ],
        "state": list(model.state_dict()),
        "modules": [
            (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
            for n, m in model.named_modules()
        ],
        "attributes": (model.count, len(model.seen), model.maps, model.names, model.last, hasattr(model, "extra")),
        "flat weights": [id(each) for each in model.rnn._flat_weights],
        "random": torch.get_rng_state().tolist(),
        "modes": (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"), len(torch.overrides._get_current_function_mode_stack()),
        ),
    }  # fmt: skip


def boom():
    raise RuntimeError("boom")


class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("boom behind")


@pytest.mark.parametrize("criterion", ["lrp", "taylor", "fisher", "wanda", "magnitude"])
def test_a_pass_changes_nothing(criterion):
    model = build()
    before = everything(model)

    scores = score(model, [batch(1), batch(2)], criterion)

    assert everything(model) == before
    assert set(scores.score) == {"first.weight", "head.weight"}


@pytest.mark.parametrize("composite", ["epsilon", "zplus"])
@pytest.mark.parametrize("where", ["forward", "second batch", "backward", "hook", "batches", "on_batch"])
def test_a_pass_that_fails_changes_nothing(where, composite):
    model, calls = build(), []

    def batches():
        yield batch(1)
        if where == "batches":
            boom()
        yield batch(2)

    def during():
        calls.append(None)
        if where == "forward" or (where == "second batch" and len(calls) > 1):
            boom()
        if where == "hook":
            model.last.register_hook(lambda gradient: boom())

    model.during = during
    if where == "backward":
        model.rnn.register_forward_pre_hook(lambda module, inputs: (Boom.apply(inputs[0]),))
    before = everything(model)

    with pytest.raises(RuntimeError, match="boom"):
        score(model, batches(), composite=composite, on_batch=boom if where == "on_batch" else None)

    assert everything(model) == before


@pytest.mark.parametrize(
    ("mode", "autocast"),
    [
        (torch.no_grad, False), (torch.inference_mode, False),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), True),
    ],
    ids=["no_grad", "inference_mode", "autocast"],
)  # fmt: skip
@pytest.mark.parametrize("criterion", ["lrp", "taylor", "wanda", "deeplift"])
def test_scores_do_not_depend_on_the_mode_of_the_caller(mode, autocast, criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3))
    x, y = batch()
    expected = score(model, [(x.float(), y)], criterion)

    with mode():
        inside = x.float().clone(), y.clone()
        scores = score(model, [inside], criterion)
        assert torch.is_autocast_enabled("cpu") == autocast

    for name in expected.score:
        assert scores.score[name].dtype == torch.float32
        assert torch.equal(scores.score[name], expected.score[name])
        assert torch.equal(scores.relevance[name], expected.relevance[name])


class Alive:
    def __init__(self, register):
        register.add(self)


class Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alive):
        ctx.alive = alive
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("composite", ["epsilon", "zplus"])
def test_each_batch_frees_its_graph_at_once(composite):
    class Probed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.head = nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x):
            z = F.relu(self.norm(self.first(x.unsqueeze(2))), inplace=True)
            z = Probe.apply(F.silu(z), Alive(alive)) * torch.sigmoid(z)
            return self.head(z.squeeze(2))

    torch.manual_seed(0)
    model, alive, left = Probed().double(), weakref.WeakSet(), []
    gc.collect()
    gc.disable()
    try:
        score(model, [batch(seed) for seed in range(20)], composite=composite, on_batch=lambda: left.append(len(alive)))
    finally:
        gc.enable()

    assert left == [0] * 20


def test_flags_are_restored_where_a_module_changes_them_itself():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval()

    with isolated(model, ["0.weight"]):
        model[1].train()

    assert [module.training for module in model.modules()] == [False, False, False]
