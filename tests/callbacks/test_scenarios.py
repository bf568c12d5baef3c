"""Whatever a Trainer is told: every phase of the schedule happens, scaled to what there is, or is refused before."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress.errors import RelevanceError

from phases import events, went_through
from toy import Corners, ToyNet, compression, fit, trainer

BAREBONES = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"))


@pytest.mark.parametrize(
    ("settings", "pruned", "quantized"),
    [
        ({}, 2, 4.75),
        ({"max_epochs": 1}, 0.25, 0.5),
        ({"max_epochs": -1, "max_steps": 24}, 1.5, 3.5),
        ({"max_epochs": 100, "max_steps": 24}, 1.5, 3.5),
        ({"min_epochs": 4, "max_steps": 24}, 1.5, 3.5),
        ({"limit_train_batches": 2}, 2, 4.5),
        ({"limit_train_batches": 0.5}, 2, 4.5),
        ({"max_time": "01:00:00:00"}, 2, 4.75),
        ({"barebones": True} | BAREBONES, 2, 4.75),
        ({"val_check_interval": 2}, 2, 4.75),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 2, 4.75),
        ({"reload_dataloaders_every_n_epochs": 1}, 2, 4.75),
        ({"overfit_batches": 2}, 2, 4.5),
        ({"accumulate_grad_batches": 3, "max_epochs": -1, "max_steps": 16}, 2, 4.75),
        ({"num_sanity_val_steps": 2, "limit_val_batches": 0.5}, 2, 4.75),
    ],
    ids=lambda value: "-".join(map(str, value)) or "plain" if isinstance(value, dict) else "",
)
def test_every_phase_happens_where_the_length_of_the_fit_puts_it(tmp_path, settings, pruned, quantized):
    callback = compression(tmp_path)
    model, _ = fit(tmp_path, [callback], **settings)

    went_through(callback, model, tmp_path)
    assert events(callback) == {"pruned": pruned, "quantized": quantized}


@pytest.mark.parametrize(
    "phases",
    [
        {"warmup": 3, "pruning_end": 5},
        {"warmup": "300 steps", "pruning_end": "500 steps"},
        {"warmup": 3, "pruning_end": 5, "relevance_epochs": [3, 4]},
    ],
    ids=["epochs", "steps", "epochs of relevance"],
)
@pytest.mark.parametrize("batches", [1, 3])
def test_fast_dev_run_goes_through_phases_that_lie_far_behind_its_end(tmp_path, phases, batches):
    callback = compression(tmp_path, **phases)
    fit(tmp_path, [callback], fast_dev_run=batches)

    kinds = [event["event"] for event in callback.report.history]
    assert kinds == ["scored"] * ("relevance_epochs" in phases) + ["pruned", "quantized"]
    assert callback.report.sparsity == 0.5
    assert callback.report.artifacts[0].max_abs_diff == 0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"limit_train_batches": 0},
            r"Trainer\(limit_train_batches=0\) trains on no batch, so nothing can be compress",
        ),
        ({"max_epochs": 0}, r"Trainer\(max_epochs=0\) trains on no batch"),
        ({"max_steps": 0}, r"Trainer\(max_steps=0\) trains on no batch"),
        (
            {"max_epochs": None, "max_time": "00:00:00:30"},
            r"not known.*\(a max_time tells none\): set Trainer\(max_ste",
        ),
        ({"max_epochs": -1}, "the length of the fit is not known"),
    ],
    ids=["limit_train_batches", "max_epochs", "max_steps", "max_time", "no end"],
)
def test_a_fit_that_no_phase_fits_into_is_refused_before_training(tmp_path, settings, text):
    model = ToyNet()
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, [compression(tmp_path)], model, **settings)
    assert model.losses == []


def loading(make, base=Corners, **attributes):
    """Data whose training loader is `make(dataset)`."""
    return type("Data", (base,), {"train_dataloader": lambda self: make(self.data), **attributes})()


def test_training_data_without_a_batch_is_refused(tmp_path):
    data = loading(lambda data: DataLoader(data, batch_size=100, drop_last=True))
    with pytest.raises(ValueError, match=r"the training data gave no batch.*smaller than a batch with drop_last=True"):
        fit(tmp_path, [compression(tmp_path)], data=data)


def test_a_trainer_refused_for_lack_of_data_can_fit_again(tmp_path):
    empty = loading(lambda data: DataLoader(data, batch_size=100, drop_last=True))
    callback = compression(tmp_path)
    run = trainer(tmp_path, [callback])
    with pytest.raises(ValueError, match="the training data gave no batch"):
        run.fit(ToyNet(), datamodule=empty)

    model = ToyNet()
    run.fit(model, datamodule=Corners())

    went_through(callback, model, tmp_path)


class Stream(IterableDataset):
    def __init__(self, data, samples):
        self.data, self.samples = data, samples

    def __iter__(self):
        return iter([self.data[index] for index in range(self.samples)])


class Sized(Stream):
    """Says how long it is, rightly or not."""

    def __init__(self, data, samples, length):
        super().__init__(data, samples)
        self.length = length

    def __len__(self):
        return self.length


@pytest.mark.parametrize(
    ("make", "settings", "pruned", "quantized"),
    [
        (lambda data: Stream(data, 64), {"max_epochs": -1, "max_steps": 24}, 1, 3),
        (lambda data: Stream(data, 64), {"limit_train_batches": 4}, 2, 4.75),
        # epochs of 2 batches and steps of 8: each epoch is a step
        (lambda data: Stream(data, 32), {"max_epochs": -1, "max_steps": 12, "accumulate_grad_batches": 8}, 3, 8),
        (lambda data: Sized(data, 64, 64), {}, 2, 4.75),
        (lambda data: Sized(data, 64, 32), {}, 2, 4.5),
        # says 8 batches an epoch, gives 2: steps tell how far the fit is
        (lambda data: Sized(data, 32, 128), {"max_epochs": -1, "max_steps": 24}, 3, 7),
        (lambda data: Sized(data, 32, 128), {}, 2, 5),
    ],
    ids=["steps", "limited", "accumulated", "right", "too short", "too long, steps", "too long, epochs"],
)
def test_a_stream_goes_through_every_phase_whatever_it_says_of_its_length(tmp_path, make, settings, pruned, quantized):
    callback = compression(tmp_path)
    data = loading(lambda data: DataLoader(make(data), batch_size=16))
    model, _ = fit(tmp_path, [callback], data=data, **settings)

    went_through(callback, model, tmp_path)
    assert events(callback) == {"pruned": pruned, "quantized": quantized}


def test_an_empty_stream_is_refused_before_training(tmp_path):
    data = loading(lambda data: DataLoader(Stream(data, 0), batch_size=16))
    model = ToyNet()
    with pytest.raises(RelevanceError, match="there was no sample to score: expected at least one batch with samples"):
        fit(tmp_path, [compression(tmp_path)], model, data, max_epochs=-1, max_steps=8)
    assert model.losses == []


class Whole(Corners):
    def train_dataloader(self):
        x, y = self.data.tensors
        return DataLoader([(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)], batch_size=None)


class Blind(Corners):
    val_dataloader = None


class Shrinking(Corners):
    """Reloaded each epoch, with less and less data."""

    loaded = 0

    def train_dataloader(self):
        self.loaded += 1
        return DataLoader(Subset(self.data, range(64 if self.loaded < 4 else 16)), batch_size=16)


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (Whole, {}),
        (Blind, {}),
        (Shrinking, {"reload_dataloaders_every_n_epochs": 1}),
        (lambda: loading(lambda data: DataLoader(data, batch_size=24, drop_last=True, shuffle=True)), {}),
    ],
    ids=["whole batches", "no validation", "shrinking", "drop_last"],
)
def test_every_phase_happens_with_unusual_data(tmp_path, data, settings):
    callback = compression(tmp_path, pruning_end=0.9)
    model, _ = fit(tmp_path, [callback], data=data(), **settings)

    went_through(callback, model, tmp_path)


class Configured(ToyNet):
    """Makes a layer where large models are made."""

    def __init__(self):
        super().__init__()
        del self.second

    def configure_model(self):
        if not hasattr(self, "second"):
            self.second = nn.Conv2d(8, 8, 3, padding=1)


def test_layers_made_in_configure_model_are_compressed(tmp_path):
    callback = compression(tmp_path)
    model, _ = fit(tmp_path, [callback], Configured)

    assert callback.report.sparsity == 0.5
    assert "second.weight" in callback.session.latent.bits
    assert 0 < (model.second.weight == 0).float().mean() < 1


def test_layers_made_in_setup_are_compressed(tmp_path):
    class Late(Configured):
        configure_model = L.LightningModule.configure_model

        def setup(self, stage):
            Configured.configure_model(self)

    callback = compression(tmp_path)
    fit(tmp_path, [callback], Late)

    assert "second.weight" in callback.session.latent.bits


def test_validating_first_changes_nothing(tmp_path):
    plain_folder, folder = tmp_path / "plain", tmp_path / "validated"
    plain, _ = fit(plain_folder, [compression(plain_folder)])
    torch.manual_seed(0)
    callback, model, data = compression(folder), ToyNet(), Corners()
    run = trainer(folder, [callback])

    run.validate(model, datamodule=data, verbose=False)
    run.fit(model, datamodule=data)

    went_through(callback, model, folder)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


class ManyValidations(Corners):
    def val_dataloader(self):
        return {"small": DataLoader(Subset(self.data, range(8)), batch_size=8), "all": super().val_dataloader()}


class ValidatesMany(ToyNet):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return super().validation_step(batch, batch_idx)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.validating and not self.trainer.sanity_checking:
            assert (len(batch[0]) == 8) == (dataloader_idx == 0)
        return batch


def test_several_validation_loaders_are_measured_together(tmp_path):
    callback = compression(tmp_path, metric=MulticlassAccuracy(4, average="micro"))
    model, _ = fit(tmp_path, [callback], ValidatesMany(), ManyValidations())

    went_through(callback, model, tmp_path)
    x, y = Corners().data.tensors
    right = (model.eval()(x).argmax(1) == y).float()
    assert callback.report.compressed.accuracy == pytest.approx(float((right.sum() + right[:8].sum()) / 72))


@pytest.mark.parametrize("given", ["module", "fit"])
def test_loaders_of_the_module_and_loaders_given_to_fit_are_those_of_a_datamodule(tmp_path, given):
    class Own(ToyNet):
        def train_dataloader(self):
            return Corners().train_dataloader()

        def val_dataloader(self):
            return Corners().val_dataloader()

    by_datamodule, _ = fit(tmp_path / "datamodule", [compression(tmp_path / "datamodule")])
    torch.manual_seed(0)
    model = Own() if given == "module" else ToyNet()
    callback = compression(tmp_path)
    data = Corners()
    loaders = [] if given == "module" else [data.train_dataloader(), data.val_dataloader()]
    trainer(tmp_path, [callback]).fit(model, *loaders)

    went_through(callback, model, tmp_path)
    for name, tensor in by_datamodule.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
