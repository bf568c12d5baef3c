"""What else than classes a teacher's logits may be: labels one by one, and a single logit."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xai_compress import DenseTeacher, Distillation, RelevancePruning, RelevanceScoring, Scoring

from teaching import Untaught
from toy import Corners, fit


def test_labels_that_do_not_exclude_each_other_are_taught_one_by_one(tmp_path):
    """By the gradient of the written-out loss, at the logits."""
    teacher = DenseTeacher(Distillation(weight=0.5, temperature=2.0, outputs="labels"))
    module = SimpleNamespace(automatic_optimization=True)
    trainer = SimpleNamespace(precision_plugin=None, accumulate_grad_batches=1)
    teacher._fit = SimpleNamespace(module=module, trainer=trainer, in_backward=True)
    z, t = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    loss = 4 * F.binary_cross_entropy_with_logits(z / 2, (t / 2).sigmoid())
    (expected,) = torch.autograd.grad(0.5 * z.square().mean() + 0.5 * loss, z)

    pulled = teacher._pull(z.detach(), t)(torch.autograd.grad(z.square().mean(), z)[0])

    torch.testing.assert_close(pulled, expected)


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
