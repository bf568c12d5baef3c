"""A model that is taught, and its twin that writes the same loss out; shared by the tests of the dense teacher."""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F

from lightning_xai_compress import Distillation

from budgets import WideNet
from toy import compression

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
