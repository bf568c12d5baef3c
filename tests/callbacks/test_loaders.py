"""Calibration draws from several loaders as the training combines them, and a part of the batches where asked."""

import re

import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler

from lightning_xai_compress.callbacks.calibration import calibration_batches
from lightning_xai_compress.errors import RelevanceError

from toy import Corners, ToyNet, compression, fit


class Stream(IterableDataset):
    def __init__(self, data, samples):
        self.data, self.samples = data, samples

    def __iter__(self):
        return iter([self.data[index] for index in range(self.samples)])


def members(data):
    """Three loaders of 4, 3 and 2 batches."""
    return (
        DataLoader(data, batch_size=16),
        DataLoader(Subset(data, range(24)), batch_size=8, shuffle=True),
        DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(range(8))),
    )


STRUCTURES = {
    "dict": (lambda a, b, c: {"first": a, "other": b}, lambda batch: batch["first"]),
    "list": (lambda a, b, c: [a, b, c], lambda batch: batch[0]),
    "tuple": (lambda a, b, c: (a, b), lambda batch: batch[0]),
    "nested": (lambda a, b, c: {"first": a, "others": [b, {"last": c}]}, lambda batch: batch["first"]),
}


def shapes(batch):
    """The structure of a batch, with shapes for tensors."""
    if isinstance(batch, torch.Tensor):
        return tuple(batch.shape)
    if isinstance(batch, dict):
        return {key: shapes(each) for key, each in batch.items()}
    return None if batch is None else type(batch)([shapes(each) for each in batch])


class Combined(Corners):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader


class Picks(ToyNet):
    """Trains on one of its loaders, and remembers the structures of batches."""

    def __init__(self, pick):
        super().__init__()
        self.pick, self.trained, self.scored = pick, [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(shapes(batch))
        return super().training_step(self.pick(batch), batch_idx)

    def relevance_step(self, batch, batch_idx):
        self.scored.append(shapes(batch))
        x, y = self.pick(batch)
        return self(x).gather(1, y.unsqueeze(1))


@pytest.mark.parametrize("mode", [None, "max_size_cycle", "min_size", "max_size"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_scored_batches_have_the_structure_of_those_that_train(tmp_path, structure, mode):
    make, pick = STRUCTURES[structure]
    loaders = make(*members(Corners().data))
    callback, model = compression(tmp_path, relevance_epochs=1), Picks(pick)

    fit(tmp_path, [callback], model, Combined(CombinedLoader(loaders, mode) if mode else loaders))

    assert model.trained[0] in model.scored
    assert all(each == model.trained[0] for each in model.scored)
    assert {event["samples"] for event in callback.report.history if event["event"] == "scored"} == {32}
    assert callback.report.sparsity == 0.5
    assert callback.report.average_bits > 2.8


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_a_stream_may_be_among_the_loaders(tmp_path, mode):
    data = Corners().data
    loaders = {"first": DataLoader(data, batch_size=16), "other": DataLoader(Stream(data, 24), batch_size=8)}
    callback, model = compression(tmp_path), Picks(lambda batch: batch["first"])

    fit(tmp_path, [callback], model, Combined(CombinedLoader(loaders, mode)), max_steps=24, max_epochs=-1)

    assert model.trained[0] in model.scored
    assert callback.report.sparsity == 0.5
    assert callback.report.average_bits > 2.8


def test_a_loader_that_trains_its_members_one_by_one_is_refused_before_training(tmp_path):
    loader = CombinedLoader({"a": DataLoader(Corners().data, batch_size=16)}, "sequential")
    model = Picks(lambda batch: batch)
    with pytest.raises(ValueError, match="mode='sequential' cannot train: use 'max_size_cycle', 'min_size' or 'max"):
        fit(tmp_path, [compression(tmp_path)], model, Combined(loader))
    assert model.trained == []


def test_what_is_no_dataloader_is_refused_and_named(tmp_path):
    class Own:
        def __iter__(self):
            return iter(DataLoader(Corners().data, batch_size=16))

        def __len__(self):
            return 4

    model = ToyNet()
    with pytest.raises(ValueError, match=r"as torch DataLoaders \(one, or a dict or list of them\), got Own: return a"):
        fit(tmp_path, [compression(tmp_path)], model, Combined(Own()))
    assert model.losses == []


def test_a_structure_that_is_not_understood_names_relevance_step(tmp_path):
    class Unexplained(Picks):
        relevance_step = None

    make, pick = STRUCTURES["dict"]
    model = Unexplained(pick)
    with pytest.raises(RelevanceError, match=r"got a dict with keys \['first', 'other'\].*Define relevance_step"):
        fit(tmp_path, [compression(tmp_path)], model, Combined(make(*members(Corners().data))))
    assert model.trained == []


# --- which batches, in a running fit


class Counted(Dataset):
    """Gives its indices, and remembers which were read."""

    def __init__(self, length):
        self.length, self.read = length, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read.append(index)
        return torch.full((1, 6, 6), float(index)), index % 4


def drawn(tmp_path, loader, calls, **settings):
    """What `calibration_batches` gives for each of some calls, within a fit on a loader."""
    found = []

    class Drawing(ToyNet):
        def on_train_start(self):
            for call in calls:
                found.append([indices(batch) for batch in calibration_batches(self.trainer, **call)])

        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)

    fit(tmp_path, [], Drawing, Combined(loader), max_epochs=1, limit_val_batches=0, **settings)
    return found


def indices(batch):
    if isinstance(batch, dict):
        return {key: indices(each) for key, each in batch.items()}
    return batch[0][:, 0, 0, 0].int().tolist()


def flat(batches):
    return sorted(index for batch in batches for index in batch)


@pytest.mark.parametrize("kind", ["dataset", "stream", "whole batches", "own batch sampler"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_shards_together_are_the_batches_of_one_process(tmp_path, kind, world):
    data = Counted(40)
    loader = {
        "dataset": lambda: DataLoader(data, batch_size=4, shuffle=True),
        "stream": lambda: DataLoader(Stream(data, 40), batch_size=4),
        "whole batches": lambda: DataLoader([next(iter(DataLoader(data, 4))) for _ in range(10)], batch_size=None),
        "own batch sampler": lambda: DataLoader(
            data, batch_sampler=torch.utils.data.BatchSampler(SubsetRandomSampler(range(40)), 4, False)
        ),
    }[kind]()
    call = {"samples": 30, "seed": 3}

    whole, *shards = drawn(tmp_path, loader, [call, *({**call, "shard": (rank, world)} for rank in range(world))])

    assert len(whole) == 8  # 30 samples in whole batches of 4
    for rank, shard in enumerate(shards):
        assert shard == whole[rank::world]


def test_a_shard_reads_no_sample_of_another_one(tmp_path):
    data = Counted(40)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    read = []

    class Drawing(ToyNet):
        def on_train_start(self):
            for rank in range(2):
                data.read.clear()
                batches = list(calibration_batches(self.trainer, samples=40, seed=3, shard=(rank, 2)))
                assert sorted(data.read) == flat(indices(batch) for batch in batches)
                read.append(set(data.read))

    fit(tmp_path, [], Drawing, Combined(loader), max_epochs=1, limit_val_batches=0)

    assert len(read[0]) == len(read[1]) == 20
    assert not read[0] & read[1]


def test_random_transforms_of_a_shard_are_those_of_one_process(tmp_path):
    class Noisy(Counted):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randint(1000, (1,)), y

    call = {"samples": 40, "seed": 3}
    whole, first, second = drawn(
        tmp_path,
        DataLoader(Noisy(40), batch_size=4),
        [call, {**call, "shard": (0, 2)}, {**call, "shard": (1, 2)}],
    )

    assert first == whole[::2]
    assert second == whole[1::2]


def test_several_loaders_are_drawn_until_all_have_been_through_and_shards_agree(tmp_path):
    loader = {
        "a": DataLoader(Counted(8), batch_size=4, shuffle=True),
        "b": DataLoader(Counted(24), batch_size=4, shuffle=True),
    }
    call = {"samples": 1000, "seed": 3}
    whole, shard, other_seed = drawn(tmp_path, loader, [call, {**call, "shard": (1, 2)}, {**call, "seed": 4}])

    assert len(whole) == 6
    assert flat(batch["b"] for batch in whole) == list(range(24))
    for round_of_a in range(3):  # used up, it begins anew
        assert flat(batch["a"] for batch in whole[2 * round_of_a : 2 * round_of_a + 2]) == list(range(8))
    assert shard == whole[1::2]
    assert other_seed != whole


def test_overfitting_calibrates_on_the_batches_that_train(tmp_path):
    (batches,) = drawn(
        tmp_path, DataLoader(Counted(40), batch_size=4, shuffle=True), [{"samples": 40, "seed": 3}], overfit_batches=2
    )

    assert flat(batches) == list(range(8))


def test_samples_of_a_dataset_that_reads_many_at_once_are_read_so(tmp_path):
    class Many(Counted):
        def __getitem__(self, index):
            raise AssertionError("read one by one")

        def __getitems__(self, wanted):
            return [super(Many, self).__getitem__(index) for index in wanted]

    (batches,) = drawn(tmp_path, DataLoader(Many(40), batch_size=4), [{"samples": 40, "seed": 3}])

    assert flat(batches) == list(range(40))


def test_a_stream_that_gives_one_iterator_to_all_is_refused(tmp_path):
    class Shared(IterableDataset):
        def __init__(self, data):
            self.source = iter(list(data))

        def __iter__(self):
            return self.source

    text = "Shared.__iter__ returns the dataset itself, or twice the same iterator"
    with pytest.raises(ValueError, match=re.escape(text)):
        fit(
            tmp_path,
            [compression(tmp_path)],
            ToyNet(),
            Combined(DataLoader(Shared(Corners().data), batch_size=16)),
            max_steps=4,
            max_epochs=-1,
        )


def test_a_sampler_and_a_dataset_that_cannot_be_copied_are_used_as_they_are(tmp_path):
    class Uncopied(Counted):
        def __copy__(self):
            raise TypeError("no copies")

    class Stubborn(SubsetRandomSampler):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    data = Uncopied(40)
    loader = DataLoader(data, batch_size=4, sampler=Stubborn(range(0, 40, 2)))
    (batches,) = drawn(tmp_path, loader, [{"samples": 40, "seed": 3}])

    assert flat(batches) == list(range(0, 40, 2))
    assert data.read
