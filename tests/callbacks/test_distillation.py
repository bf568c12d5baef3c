"""The dense model teaches the compressed one through the gradient at the logits; training_step knows nothing of it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_xai_compress import DenseTeacher, Distillation
from lightning_xai_compress.callbacks.distillation import _scale
from lightning_xai_compress.errors import RelevanceError

from budgets import Stop
from teaching import DISTILLATION, NAMED, Taught, Untaught, taught, weights
from toy import ToyNet, fit, watch_scores


@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_is_the_gradient_of_the_loss_written_out(tmp_path, accumulated):
    settings = {"max_epochs": 4, "accumulate_grad_batches": accumulated}
    explicit, _ = fit(tmp_path, [taught(tmp_path, distillation=None)], model=Taught, **settings)
    plain, _ = fit(tmp_path, [taught(tmp_path, distillation=None)], model=Untaught, **settings)
    hooked, _ = fit(tmp_path, [taught(tmp_path, distillation=NAMED)], model=Untaught, **settings)

    assert not torch.allclose(plain.head.weight, hooked.head.weight, atol=1e-3)
    for name, value in explicit.named_parameters():
        torch.testing.assert_close(hooked.get_parameter(name), value, rtol=1e-4, atol=1e-5)


def test_all_else_is_as_without_a_teacher_dropout_too(tmp_path):
    """A weight so small that it does not count."""

    class Dropped(Untaught):
        def forward(self, x):
            hidden = F.dropout(F.relu(self.first(x.flatten(1))), 0.5, self.training)
            return self.head(F.relu(self.middle(hidden)))

    found = [
        fit(tmp_path, [taught(tmp_path, distillation=each)], model=Dropped, max_epochs=3)[0]
        for each in (None, Distillation(weight=1e-30))
    ]

    for name, value in found[0].named_parameters():
        torch.testing.assert_close(found[1].get_parameter(name), value, rtol=0, atol=0)


class Look(Callback):
    """What the module and its teacher are after every batch."""

    def __init__(self, ours):
        self.ours, self.modules, self.teachers = ours, [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.modules.append(weights(module))
        self.teachers.append({name: value.clone() for name, value in self.ours._teacher._weights.items()})


def test_the_teacher_is_the_dense_model_and_stays_what_it_was(tmp_path):
    ours = taught(tmp_path, warmup=1)
    look = Look(ours)
    fit(tmp_path, [ours, look], model=ToyNet, max_epochs=6)

    begun = next(index for index, each in enumerate(look.teachers) if each)
    assert begun == 4  # batches of an epoch
    for name, value in look.modules[begun - 1].items():
        assert torch.equal(look.teachers[begun][name], value), name
        assert torch.equal(look.teachers[-1][name], value), name
    assert (look.modules[-1]["first.weight"] == 0).any()


def test_where_nothing_is_pruned_the_teacher_is_the_model_after_the_warm_up(tmp_path):
    """Not the one of the first quantized batch, which may be in the middle of a schedule."""
    ours = taught(tmp_path, warmup=1, sparsity=0.0)
    look = Look(ours)

    fit(tmp_path, [ours, look], model=ToyNet, max_epochs=6)

    begun = next(index for index, each in enumerate(look.teachers) if each)
    quantized = next(event for event in ours.report.history if event["event"] == "quantized")
    assert begun == 4 < 4 * quantized["epoch"]
    for name, value in look.modules[begun - 1].items():
        assert torch.equal(look.teachers[-1][name], value), name


def test_a_start_after_the_first_compressed_batch_is_too_late(tmp_path):
    ours = taught(tmp_path, warmup=1)
    ours._teacher.start = 3
    look = Look(ours)

    fit(tmp_path, [ours, look], model=ToyNet, max_epochs=6)

    assert [bool(each) for each in look.teachers[:5]] == [False] * 4 + [True]
    with pytest.raises(ValueError, match=r"start of the teacher=9 lies past the end of the fit"):
        fit(tmp_path, [*taught(tmp_path, distillation=None).stages(), DenseTeacher(NAMED, start=9)], max_epochs=2)
    with pytest.raises(ValueError, match="start of the teacher must not be negative"):
        DenseTeacher(start=-1)


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


def test_several_modules_are_refused_after_the_first_batch(tmp_path):
    with pytest.raises(RelevanceError, match=r"logits came from \['first', 'head', 'middle'\]. Let one module"):
        fit(tmp_path, [taught(tmp_path)], model=Split, max_epochs=2)


def test_a_head_alone_is_refused_since_the_dense_model_has_other_features(tmp_path):
    with pytest.raises(RelevanceError, match="cannot teach 'head' alone: what it is called with depends on trained"):
        fit(tmp_path, [taught(tmp_path, distillation=replace(DISTILLATION, module="head"))], model=Split, max_epochs=1)


def test_a_named_module_that_is_not_called_is_refused(tmp_path):
    class Direct(Untaught):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.forward(batch[0]), batch[1])

    with pytest.raises(
        RelevanceError, match=r"of \[''\], which training_step may call .* none gave a tensor of logits"
    ):
        fit(tmp_path, [taught(tmp_path, distillation=NAMED)], model=Direct, max_epochs=2)


def test_an_axis_that_logits_do_not_have_is_refused(tmp_path):
    wrong = replace(NAMED, class_axis=2)
    with pytest.raises(RelevanceError, match=r"class_axis=2\) does not fit logits of shape \(16, 4\)"):
        fit(tmp_path, [taught(tmp_path, distillation=wrong)], model=Untaught, max_epochs=2)


class Aside(Untaught):
    """Changes its input, and leaves something behind that the loss needs."""

    def forward(self, x):
        x = x.flatten(1).mul_(2.0)
        self.hidden = F.relu(self.first(x))
        return self.head(F.relu(self.middle(self.hidden)))

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        given = inputs.clone()
        logits = self(given)
        torch.testing.assert_close(given, 2 * inputs)  # once, not by the teacher as well
        assert self.hidden.requires_grad
        return F.cross_entropy(logits, target) + 0.1 * self.hidden.square().mean()


def test_what_a_forward_changes_and_leaves_behind_is_the_students(tmp_path):
    model, _ = fit(tmp_path, [taught(tmp_path, distillation=NAMED)], model=Aside, max_epochs=3)

    assert all(torch.isfinite(value).all() for value in model.parameters())


def test_only_the_loss_that_goes_back_is_taught(tmp_path):
    class Attacked(Untaught):
        """Looks at the gradient at its input first."""

        def training_step(self, batch, batch_idx):
            inputs = batch[0].clone().requires_grad_()
            loss = F.cross_entropy(self(inputs), batch[1])
            (gradient,) = torch.autograd.grad(loss, inputs, retain_graph=True)
            with torch.no_grad():
                plain = F.linear(F.relu(self.first(inputs.flatten(1))), self.middle.weight, self.middle.bias)
                apart = self.head(F.relu(plain)).softmax(1) - F.one_hot(batch[1], 4)
                below = (apart @ self.head.weight * (plain > 0)) @ self.middle.weight
                below = below * (self.first(inputs.flatten(1)) > 0) @ self.first.weight / len(inputs)
            torch.testing.assert_close(gradient.flatten(1), below)
            return loss

    attacked, _ = fit(tmp_path, [taught(tmp_path, distillation=NAMED)], model=Attacked, max_epochs=3)
    hooked, _ = fit(tmp_path, [taught(tmp_path, distillation=NAMED)], model=Untaught, max_epochs=3)

    for name, value in hooked.named_parameters():
        torch.testing.assert_close(attacked.get_parameter(name), value)


def test_manual_optimization_is_taught_alike(tmp_path):
    class Manual(Untaught):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    manual, _ = fit(tmp_path, [taught(tmp_path, distillation=NAMED)], model=Manual, max_epochs=3)
    hooked, _ = fit(tmp_path, [taught(tmp_path, distillation=NAMED)], model=Untaught, max_epochs=3)

    for name, value in hooked.named_parameters():
        torch.testing.assert_close(manual.get_parameter(name), value, rtol=0, atol=0)


def test_the_added_gradient_is_scaled_as_the_loss_is(tmp_path):
    """What a gradient scaler and accumulation do to the loss, without a GPU."""
    plugin = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 1024.0))
    trainer = SimpleNamespace(precision_plugin=plugin, accumulate_grad_batches=4)

    assert _scale(SimpleNamespace(trainer=trainer, module=SimpleNamespace(automatic_optimization=True))) == 256
    assert _scale(SimpleNamespace(trainer=trainer, module=SimpleNamespace(automatic_optimization=False))) == 1024


def test_scores_are_those_of_a_fit_without_a_teacher_even_after_a_skipped_batch(tmp_path, monkeypatch):
    class Skips(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            return -1 if trainer.current_epoch == 1 else None  # ends the epoch

    found = []
    for distillation in (None, Distillation(weight=1e-30)):
        seen = watch_scores(monkeypatch)
        ours = taught(tmp_path, distillation=distillation)
        fit(tmp_path, [ours, Skips()], model=Untaught, max_epochs=4)
        found.append(seen)
        monkeypatch.undo()

    assert len(found[0]) == len(found[1]) > 2
    for plain, beside in zip(*found, strict=True):
        assert all(torch.equal(plain.relevance[name], beside.relevance[name]) for name in plain.relevance)


@pytest.mark.parametrize("compiled", ["whole", "child"])
def test_a_compiled_model_is_taught_as_an_eager_one(tmp_path, compiled):
    class Compiled(Nested):
        def __init__(self):
            super().__init__()
            if compiled == "child":
                self.net.compile(backend="eager")

    torch.manual_seed(0)
    model = Compiled()
    given = torch.compile(model, backend="eager") if compiled == "whole" else model
    torch.manual_seed(0)
    eager = Nested()
    fit(tmp_path, [taught(tmp_path)], model=given, max_epochs=3)
    fit(tmp_path, [taught(tmp_path)], model=eager, max_epochs=3)

    torch.testing.assert_close(model.head.weight, eager.head.weight)


def test_going_on_without_the_dense_model_is_refused(tmp_path):
    fit(tmp_path, [taught(tmp_path, distillation=None), Stop(2, tmp_path / "second.ckpt")], model=Untaught)

    with pytest.raises(ValueError, match="compressed without a teacher, so the dense model is gone"):
        fit(tmp_path, [taught(tmp_path)], model=Untaught, ckpt_path=tmp_path / "second.ckpt")


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
        ({"outputs": "probabilities"}, "outputs must be 'classes' or 'labels', got 'probabilities'"),
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
