"""The training sees the same samples and random numbers as without the callback, whatever draws them."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from lightning_xai_compress import Scoring
from lightning_xai_compress.callbacks.calibration import calibration_batches

from toy import Corners, ToyNet, compression, fit


class Recording(ToyNet):
    def __init__(self):
        super().__init__()
        self.seen, self.noise = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].double().sum())
        self.noise.append(torch.rand(1) + np.random.rand() + random.random())
        return super().training_step(batch, batch_idx)


class Noisy(Dataset):
    """Augments with all global generators, and with three of its own."""

    def __init__(self, data, own):
        self.data, self.calls = data, 0
        self.own = [torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)] if own else None

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        self.calls += 1  # a counter of its own, that augmentation depends on
        if self.own is None:
            return x + torch.rand(1) + np.random.rand() + random.random(), y
        ours, theirs, pythons = self.own
        return x + torch.rand(1, generator=ours) + theirs.random() + pythons.random() + self.calls, y


class Wandering(Sampler):
    """Remembers where it stood, as resumable samplers do."""

    def __init__(self, data):
        self.data, self.passes, self.generator = data, 0, np.random.RandomState(3)

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        self.passes += 1
        order = self.generator.permutation(len(self.data))
        return iter(np.roll(order, self.passes).tolist())


class Turning(IterableDataset):
    """A stream that begins each pass elsewhere."""

    def __init__(self, data):
        self.data, self.passes = data, 0

    def __iter__(self):
        self.passes += 1
        yield from (self.data[(index + self.passes) % len(self.data)] for index in range(len(self.data)))

    def __len__(self):
        return len(self.data)


def loaders(kind, data):
    if kind == "global generators":
        return DataLoader(Noisy(data, own=False), batch_size=16, shuffle=True)
    if kind == "the dataset's own generators":
        return DataLoader(Noisy(data, own=True), batch_size=16, shuffle=True)
    if kind == "the sampler's own generator":
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(5))
        return DataLoader(data, batch_size=16, sampler=sampler)
    if kind == "the loader's own generator":
        return DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5))
    if kind == "a sampler with state":
        return DataLoader(data, batch_size=16, sampler=Wandering(data))
    if kind == "a batch sampler with state":
        batches = torch.utils.data.BatchSampler(Wandering(data), 16, drop_last=False)
        return DataLoader(data, batch_sampler=batches)
    if kind == "a stream with state":
        return DataLoader(Turning(data), batch_size=16)
    workers = {"num_workers": 2, "persistent_workers": kind == "persistent workers"}
    return DataLoader(Noisy(data, own=False), batch_size=16, shuffle=True, **workers)


def check(tmp_path, make, model=Recording, **settings):
    class Data(Corners):
        def train_dataloader(self):
            return make(self.data)

    seed_everything(0, verbose=False)
    plain, _ = fit(tmp_path / "plain", [], model, Data(), **settings)
    seed_everything(0, verbose=False)
    callback = compression(tmp_path / "ours", relevance_epochs=1, scoring=Scoring(samples=48))
    ours, _ = fit(tmp_path / "ours", [callback], model, Data(), **settings)

    assert torch.equal(torch.stack(plain.seen), torch.stack(ours.seen))
    assert torch.equal(torch.stack(plain.noise), torch.stack(ours.noise))
    assert callback.report.sparsity == 0.5
    assert sum(event["event"] == "scored" for event in callback.report.history) == settings.get("max_epochs", 8)
    return plain, ours


@pytest.mark.parametrize(
    "kind",
    [
        "global generators",
        "the dataset's own generators",
        "the sampler's own generator",
        "the loader's own generator",
        "a sampler with state",
        "a batch sampler with state",
        "a stream with state",
    ],
)
def test_what_draws_random_numbers_draws_those_of_a_run_without_the_callback(tmp_path, kind):
    plain, ours = check(tmp_path, lambda data: loaders(kind, data))

    assert plain.losses[:8] == ours.losses[:8]  # the warm-up, to the last bit
    assert plain.losses[9:] != ours.losses[9:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["persistent workers", "workers"])
def test_workers_give_the_batches_of_a_run_without_the_callback(tmp_path, kind):
    check(tmp_path, lambda data: loaders(kind, data), max_epochs=4)


def test_several_loaders_give_the_batches_of_a_run_without_the_callback(tmp_path):
    class Both(Recording):
        def training_step(self, batch, batch_idx):
            first, second = batch["first"], batch["second"]
            return super().training_step((first[0] + second[0][: len(first[0])].mean(), first[1]), batch_idx)

        def relevance_step(self, batch, batch_idx):
            x, y = batch["first"]
            return self(x).gather(1, y.unsqueeze(1))

    def make(data):
        return {
            "first": loaders("a sampler with state", data),
            "second": loaders("the dataset's own generators", data),
        }

    check(tmp_path, make, Both)


def test_calibration_draws_by_its_seed_also_from_generators_of_the_dataset(tmp_path):
    """So that a resumed fit scores the same samples, wherever the generators stood."""
    drawn = []

    class Drawing(ToyNet):
        def on_train_epoch_start(self):
            data = self.trainer.train_dataloader.dataset
            before = data.own[1].bit_generator.state
            drawn.append(torch.cat([x for x, _ in calibration_batches(self.trainer, samples=32, seed=4)]))
            assert data.own[1].bit_generator.state == before
            data.own[1].random()  # the training goes on

    class Data(Corners):
        def train_dataloader(self):
            return DataLoader(Noisy(self.data, own=True), batch_size=16)

    fit(tmp_path, [], Drawing, Data(), max_epochs=2)

    assert torch.allclose(drawn[1] - drawn[0], torch.tensor(64.0), atol=1e-4)  # only what counts calls has moved on
