"""Steps are not always batches: the phases follow accumulation that changes, trials before the fit, steps by hand."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from phases import events, went_through
from toy import Corners, ToyNet, compression, fit, trainer

# --- Lightning's callbacks that change the fit


@pytest.mark.parametrize(
    ("phases", "settings", "quantized"),
    [
        # 4 + 4 steps in the first two epochs, then one an epoch: 14 in all, of which 10 are over after epoch 4
        ({"warmup": "8 steps", "pruning_end": "10 steps"}, {}, 4),
        ({"warmup": 2, "pruning_end": 4}, {}, 4),
        ({"warmup": 2, "pruning_end": 4}, {"max_epochs": -1, "max_steps": 14}, 4),
    ],
    ids=["steps", "epochs", "until a step"],
)
def test_the_clock_agrees_with_an_accumulation_that_changes(tmp_path, phases, settings, quantized):
    steps = {}

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for event in callback.session.history:
                steps.setdefault(event["event"], trainer.global_step)

    callback = compression(tmp_path, **phases)
    scheduler = GradientAccumulationScheduler({0: 1, 2: 4})
    model, run = fit(tmp_path, [callback, scheduler, Watch()], **settings)

    went_through(callback, model, tmp_path)
    assert run.global_step == 14
    assert run.current_epoch == 8
    assert steps == {"pruned": 8, "quantized": 10}
    assert events(callback) == {"pruned": 2, "quantized": quantized}


class FindsBatchSize(ToyNet):
    def __init__(self):
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self):
        return DataLoader(Corners().data, batch_size=self.batch_size)

    def val_dataloader(self):
        return Corners().val_dataloader()


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "finder",
    [
        lambda: LearningRateFinder(num_training_steps=20, max_lr=0.05),
        lambda: BatchSizeFinder(max_trials=3, steps_per_trial=2),
    ],
    ids=["LearningRateFinder", "BatchSizeFinder"],
)
def test_a_finder_runs_its_trials_without_us_and_the_fit_is_whole(tmp_path, finder, order):
    callback, found = compression(tmp_path), finder()
    torch.manual_seed(0)
    model = FindsBatchSize()
    run = trainer(tmp_path, [callback, found] if order == "before" else [found, callback])
    run.fit(model)

    went_through(callback, model, tmp_path)
    assert model.lr != 0.05 or model.batch_size == 8
    batches = 64 // model.batch_size
    assert run.global_step == 8 * batches
    assert events(callback) == pytest.approx({"pruned": 2, "quantized": 4.8}, abs=1 / batches)


def test_lr_find_of_the_tuner_leaves_the_fit_that_follows_whole(tmp_path):
    callback = compression(tmp_path)
    torch.manual_seed(0)
    model, data = ToyNet(), Corners()
    run = trainer(tmp_path, [callback])

    finder = Tuner(run).lr_find(model, datamodule=data, num_training=20)
    assert finder.suggestion() == model.lr
    assert callback.report is None
    run.fit(model, datamodule=data)

    went_through(callback, model, tmp_path)
    assert events(callback) == {"pruned": 2, "quantized": 4.75}


# --- steps that Lightning does not foresee


class ByHand(ToyNet):
    """Manual optimization, several steps a batch or one in several batches."""

    times, every = 1, 1

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(self.times):
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]) / self.every)
            if (batch_idx + 1) % self.every == 0:
                optimizer.step()
                optimizer.zero_grad()


class Often(ByHand):
    times = 6


class Seldom(ByHand):
    every = 4


class Leaving(ToyNet):
    """Leaves each epoch after two of its four batches."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


@pytest.mark.parametrize(
    ("model", "settings", "pruned", "quantized"),
    [
        (Often, {"max_epochs": -1, "max_steps": 120}, 1.25, 3),
        (Often, {"max_epochs": 8, "max_steps": 120}, 1.25, 3),
        (Often, {}, 2, 4.75),
        (Seldom, {"max_epochs": -1, "max_steps": 8}, 2, 4),
        (Seldom, {"max_epochs": 8, "max_steps": 20}, 2, 4.75),
        (Leaving, {"max_epochs": -1, "max_steps": 16}, 2, 4.5),
    ],
)
def test_phases_keep_their_share_of_the_fit_where_steps_are_not_batches(tmp_path, model, settings, pruned, quantized):
    callback = compression(tmp_path)
    model, _ = fit(tmp_path, [callback], model, **settings)

    went_through(callback, model, tmp_path)
    assert events(callback) == pytest.approx({"pruned": pruned, "quantized": quantized}, abs=0.51)


def test_a_training_step_that_takes_the_iterator_is_followed(tmp_path):
    class Takes(ToyNet):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    callback = compression(tmp_path)
    model, _ = fit(tmp_path, [callback], Takes)

    went_through(callback, model, tmp_path)
    assert events(callback) == {"pruned": 2, "quantized": 4.75}
