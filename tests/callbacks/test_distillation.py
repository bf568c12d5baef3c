"""The dense model teaches the compressed one through the gradient at the logits; training_step knows nothing of it."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xai_compress import DenseTeacher, Distillation, RelevancePruning, RelevanceScoring, Scoring
from lightning_xai_compress.errors import RelevanceError

from budgets import Stop, WideNet
from toy import Corners, ToyNet, compression, fit

DISTILLATION = Distillation(weight=0.6, temperature=2.0)
NAMED = replace(DISTILLATION, module="")  # from the first batch on


class Taught(WideNet):
    """The same loss, written out: what a user would have to change in training_step."""

    teacher = ()

    def on_train_start(self):
        self.teacher = (copy.deepcopy(self).eval(),)  # no child

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        logits = self(inputs)
        with torch.no_grad():
            taught = self.teacher[0](inputs)
        apart = F.kl_div(
            (logits / 2).log_softmax(1), (taught / 2).log_softmax(1), log_target=True, reduction="batchmean"
        )
        return 0.4 * F.cross_entropy(logits, target) + 0.6 * 4 * apart


class Untaught(WideNet):
    """The same forward, and its losses."""

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        return F.cross_entropy(self(inputs), target)


def taught(folder, **settings):
    return compression(folder, **({"warmup": 0, "distillation": DISTILLATION} | settings))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_is_the_gradient_of_the_loss_written_out(tmp_path, accumulated):
    settings = {"max_epochs": 4, "accumulate_grad_batches": accumulated}
    explicit, _ = fit(tmp_path, [taught(tmp_path, distillation=None)], model=Taught, **settings)
    plain, _ = fit(tmp_path, [taught(tmp_path, distillation=None)], model=Untaught, **settings)
    hooked, _ = fit(tmp_path, [taught(tmp_path, distillation=NAMED)], model=Untaught, **settings)

    assert not torch.allclose(plain.head.weight, hooked.head.weight, atol=1e-3)
    for name, value in explicit.named_parameters():
        torch.testing.assert_close(hooked.get_parameter(name), value, rtol=1e-4, atol=1e-5)


def test_half_precision_and_dropout_train_as_before(tmp_path):
    """A weight so small that it does not count: all else, such as draws of dropout, is as without a teacher."""

    class Dropped(Untaught):
        def forward(self, x):
            hidden = F.dropout(F.relu(self.first(x.flatten(1))), 0.5, self.training)
            return self.head(F.relu(self.middle(hidden)))

    found = [
        fit(tmp_path, [taught(tmp_path, distillation=each)], model=Dropped, max_epochs=3)[0]
        for each in (None, Distillation(weight=1e-30))
    ]

    for name, value in found[0].named_parameters():
        torch.testing.assert_close(found[1].get_parameter(name), value)


def test_the_teacher_is_the_dense_model_and_stays_what_it_was(tmp_path):
    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            teachers.append(callback._teacher._weights.copy())

    teachers, callback = [], taught(tmp_path, warmup=1)
    model = ToyNet()
    fit(tmp_path, [callback, Look()], model=model, max_epochs=6)

    assert not teachers[0]
    assert all((teachers[-1][name] != 0).all() for name in ("first.weight", "head.weight"))
    begun = next(each for each in teachers if each)
    assert all(torch.equal(begun[name], teachers[-1][name]) for name in begun)
    assert set(begun) == {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}


def test_a_resumed_fit_has_the_teacher_of_the_first_one(tmp_path):
    whole, _ = fit(tmp_path, [taught(tmp_path, warmup=1)], model=Untaught, max_epochs=6)
    stopped = Stop(3, tmp_path / "third.ckpt")
    fit(tmp_path, [taught(tmp_path, warmup=1), stopped], model=Untaught, max_epochs=6)

    resumed, _ = fit(
        tmp_path, [taught(tmp_path, warmup=1)], model=Untaught, max_epochs=6, ckpt_path=tmp_path / "third.ckpt"
    )

    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_the_module_is_left_as_found_also_after_an_error(tmp_path):
    class Fails(Untaught):
        def on_train_epoch_end(self):
            raise KeyError("mine")

    for kind in (Untaught, Fails):
        model = kind()
        try:
            fit(tmp_path, [taught(tmp_path)], model=model, max_epochs=2)
        except KeyError:
            assert kind is Fails
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Nested(Untaught):
    """Calls a child, not itself; its loss and its metric are children, too."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), self.first, nn.ReLU(), self.middle, nn.ReLU(), self.head)
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        return self.loss(self.net(inputs), target)


def test_a_child_that_training_step_calls_is_found(tmp_path):
    callback = taught(tmp_path)
    nested, _ = fit(tmp_path, [callback], model=Nested, max_epochs=3)
    direct, _ = fit(tmp_path, [taught(tmp_path)], model=Untaught, max_epochs=3)

    assert callback._teacher._target == "net"
    torch.testing.assert_close(nested.head.weight, direct.head.weight)


class Split(Untaught):
    def training_step(self, batch, batch_idx):
        inputs, target = batch
        hidden = F.relu(self.first(inputs.flatten(1)))
        return F.cross_entropy(self.head(F.relu(self.middle(hidden))), target)


def test_several_modules_are_refused_after_the_first_batch_unless_one_is_named(tmp_path):
    with pytest.raises(RelevanceError, match=r"logits came from \['first', 'head', 'middle'\]: name the one"):
        fit(tmp_path, [taught(tmp_path)], model=Split, max_epochs=2)

    named = replace(DISTILLATION, module="head")
    split, _ = fit(tmp_path, [taught(tmp_path, distillation=named)], model=Split, max_epochs=1)

    assert all(torch.isfinite(value).all() for value in split.parameters())


def test_a_training_step_that_calls_none_of_them_is_refused(tmp_path):
    class Functional(Untaught):
        def training_step(self, batch, batch_idx):
            inputs, target = batch
            hidden = F.relu(F.linear(inputs.flatten(1), self.first.weight))
            return F.cross_entropy(F.linear(F.relu(hidden @ self.middle.weight.T), self.head.weight), target)

    with pytest.raises(RelevanceError, match="none gave a tensor of logits"):
        fit(tmp_path, [taught(tmp_path)], model=Functional, max_epochs=2)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"weight": 0}, r"weight must lie in \(0, 1\]"),
        ({"weight": 1.5}, r"weight must lie in \(0, 1\]"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"class_axis": 1.5}, "class_axis"),
        ({"module": 3}, "module must be the name of a submodule, got 3"),
    ],
)
def test_settings_out_of_range_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        Distillation(**settings)


def test_what_does_not_fit_the_model_is_refused_before_training(tmp_path):
    model = Untaught()
    wrong = taught(tmp_path, distillation=Distillation(module="nett"))

    with pytest.raises(ValueError, match=r"module='nett'\): there is no such module in Untaught; it has first, head"):
        fit(tmp_path, [wrong], model=model)
    with pytest.raises(ValueError, match="needs RelevancePruning or MixedPrecision in the same Trainer"):
        fit(tmp_path, [DenseTeacher()], model=model)
    with pytest.raises(ValueError, match=r"distillation must be a Distillation\(...\), got 0.7"):
        DenseTeacher(0.7)


class OneLogit(Untaught):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 1)

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        return F.binary_cross_entropy_with_logits(self(inputs), target)

    def validation_step(self, batch, batch_idx):
        pass


class Binary(Corners):
    """Whether the bright corner is below; targets in the shape of the logits."""

    def train_dataloader(self):
        inputs, target = self.data.tensors
        return DataLoader(TensorDataset(inputs, (target > 1).float()[:, None]), batch_size=32)


def test_a_single_logit_is_taught_by_the_logistic_function_and_without_the_bundle(tmp_path):
    taught_by = DenseTeacher(Distillation(weight=1.0, temperature=1.0, module=""))
    pruning = RelevancePruning(sparsity=0.5, start=0, end=1, selection="least")

    model, _ = fit(tmp_path, [RelevanceScoring(scoring=Scoring(samples=32)), pruning, taught_by], OneLogit, Binary())

    # from a network that has not learned anything: all that is learned is to be as it was
    inputs = Binary().data.tensors[0]
    torch.manual_seed(0)
    dense = OneLogit()
    with torch.no_grad():
        apart = (model(inputs).sigmoid() - dense(inputs).sigmoid()).abs().mean()
        spread = (dense(inputs).sigmoid() - dense(inputs).sigmoid().mean()).abs().mean()
    assert apart < spread / 2
