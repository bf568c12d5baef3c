"""ModelCheckpoint and EarlyStopping choose among compressed epochs."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import RelevancePruning

from toy import Corners, ToyNet, compression, fit, trainer


def saver(folder, **settings):
    return ModelCheckpoint(dirpath=folder / "ckpt", filename="{epoch}", **settings)


class Falling(ToyNet):
    """Gets worse from epoch to epoch, so that dense epochs look best."""

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 1.0 - 0.05 * self.current_epoch)
        self.log("val_loss", 1.0 + 0.05 * self.current_epoch)

    def test_step(self, batch, batch_idx):
        self.log("test_zeros", float((self.head.weight == 0).float().mean()))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class Data(Corners):
    def test_dataloader(self):
        return DataLoader(self.data, batch_size=32)

    predict_dataloader = test_dataloader


@pytest.mark.parametrize(("metric", "mode"), [("val_acc", "max"), ("val_loss", "min")])
def test_the_best_checkpoint_is_a_compressed_one(tmp_path, metric, mode):
    best = saver(tmp_path, monitor=f"compressed_{metric}", mode=mode)
    _, run = fit(tmp_path, [compression(tmp_path, metric=metric), best], Falling(), Data(), enable_checkpointing=True)

    # quantized training begins in epoch 4, so its validation is the first of a compressed model
    assert best.best_model_path.endswith("epoch=4.ckpt")
    assert run.callback_metrics[f"compressed_{metric}"] == run.callback_metrics[metric]


@pytest.mark.parametrize("first", ["fit", "export"])
def test_the_best_checkpoint_is_tested_validated_and_predicted_after_the_fit(tmp_path, first):
    best = saver(tmp_path, monitor="compressed_val_acc", mode="max")
    callback = compression(tmp_path, metric="val_acc", export="best" if first == "export" else "last", mode="max")
    model, run = fit(tmp_path, [callback, best], Falling(), Data(), enable_checkpointing=True)
    written = (tmp_path / "model.safetensors").read_bytes()

    plain = Falling.load_from_checkpoint(best.best_model_path)
    tested = run.test(model, datamodule=Data(), ckpt_path="best", verbose=False)[0]
    run.validate(model, datamodule=Data(), ckpt_path="best", verbose=False)
    predicted = torch.cat(run.predict(model, datamodule=Data(), ckpt_path="best"))

    assert tested["test_zeros"] == pytest.approx(float((plain.head.weight == 0).float().mean()))
    assert tested["test_zeros"] > 0.1
    assert torch.equal(predicted, plain.eval()(Data().data.tensors[0]).detach())
    assert (tmp_path / "model.safetensors").read_bytes() == written
    for name, tensor in model.state_dict().items():  # trainer.test has loaded the best
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_the_metric_is_there_from_the_first_epoch_and_worse_than_any_measured_one(tmp_path):
    class Watch(EarlyStopping):
        def __init__(self):
            super().__init__("compressed_val_acc", mode="max", patience=1)
            self.seen = []

        def _run_early_stopping_check(self, trainer):
            self.seen.append(float(trainer.callback_metrics[self.monitor]))
            super()._run_early_stopping_check(trainer)

    watch = Watch()
    fit(tmp_path, [watch, compression(tmp_path, metric="val_acc")])

    assert len(watch.seen) == 8 or watch.seen[-1] <= watch.seen[-2]  # ended by itself, but not before
    assert all(value < -1e37 for value in watch.seen[:4])
    assert watch.seen[:4] == sorted(set(watch.seen[:4]))
    assert all(0 <= value <= 1 for value in watch.seen[4:])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_early_stopping_waits_for_the_compressed_model_and_reads_its_metric_at_once(tmp_path, interval, order):
    class Watch(EarlyStopping):
        def __init__(self):
            super().__init__("compressed_val_acc", mode="max", patience=1)
            self.pairs = []

        def _run_early_stopping_check(self, trainer):
            self.pairs.append(
                (float(trainer.callback_metrics[self.monitor]), float(trainer.callback_metrics["val_acc"]))
            )
            super()._run_early_stopping_check(trainer)

    watch, callback = Watch(), compression(tmp_path, metric="val_acc")
    _, run = fit(tmp_path, [watch, callback][::order], Falling(), val_check_interval=interval)

    compressed = [pair for pair in watch.pairs if pair[0] > 0]
    assert all(ours == logged for ours, logged in compressed)
    assert len(compressed) >= 2
    assert callback.report.sparsity == pytest.approx(0.5, abs=0.01)
    assert run.current_epoch < 8  # patience counts once compression is done


def test_a_torchmetrics_metric_is_published_too(tmp_path):
    best = saver(tmp_path, monitor="compressed_MulticlassAccuracy", mode="max")
    callback = compression(tmp_path, metric=MulticlassAccuracy(4, average="micro"))
    _, run = fit(tmp_path, [callback, best], enable_checkpointing=True)

    assert float(run.callback_metrics["compressed_MulticlassAccuracy"]) == pytest.approx(
        callback.report.compressed.accuracy
    )
    assert best.best_model_score <= 1


def test_without_validation_a_metric_of_training_is_published(tmp_path):
    class Training(ToyNet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss, on_epoch=True)
            return loss

    best = saver(tmp_path, monitor="compressed_train_loss", save_on_train_epoch_end=True)
    callback = compression(tmp_path, metric="train_loss")
    fit(tmp_path, [callback, best], Training(), limit_val_batches=0, enable_checkpointing=True)

    assert int(best.best_model_path.partition("epoch=")[2].partition(".")[0]) >= 4


@pytest.mark.parametrize(
    ("other", "metric", "text"),
    [
        (
            ModelCheckpoint(monitor="val_acc", mode="max"),
            "val_acc",
            r"ModelCheckpoint\(monitor='val_acc'\) will keep a model from before compression as the best one: change "
            r"it to ModelCheckpoint\(monitor='compressed_val_acc', ...\)$",
        ),
        (
            EarlyStopping(monitor="val_acc", mode="max"),
            None,
            r"EarlyStopping\(monitor='val_acc'\) may end the fit before compression is done: change it to "
            r"EarlyStopping\(monitor='compressed_val_acc', ...\) and XAICompression\(metric='val_acc', ...\)$",
        ),
    ],
    ids=["checkpoint", "early stopping"],
)
def test_monitoring_the_dense_metric_is_warned_of_with_the_line_to_change(tmp_path, other, metric, text):
    with pytest.warns(UserWarning, match=text):
        fit(tmp_path, [compression(tmp_path, metric=metric), other], enable_checkpointing=True, max_epochs=2)


def test_a_stage_alone_warns_as_well(tmp_path):
    with pytest.warns(UserWarning, match=r"EarlyStopping\(monitor='val_acc'\) may end the fit"):
        fit(tmp_path, [RelevancePruning(sparsity=0.5), EarlyStopping("val_acc")], max_epochs=2)


def test_monitoring_the_compressed_metric_or_none_is_not_warned_of(tmp_path):
    callbacks = [
        compression(tmp_path, metric="val_acc"),
        saver(tmp_path, monitor="compressed_val_acc", mode="max"),
        ModelCheckpoint(dirpath=tmp_path / "last", save_last=True),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, callbacks, enable_checkpointing=True)
    assert not [each for each in caught if "monitor" in str(each.message)]


def test_monitoring_a_compressed_metric_that_nobody_measures_is_refused_before_training(tmp_path):
    model = ToyNet()
    with pytest.raises(ValueError, match=r"no metric is named: write XAICompression\(metric='val_acc', ...\)"):
        fit(tmp_path, [compression(tmp_path), EarlyStopping("compressed_val_acc")], model)
    with pytest.raises(ValueError, match="what is measured is 'compressed_val_acc'"):
        fit(tmp_path, [compression(tmp_path, metric="val_acc"), EarlyStopping("compressed_val_loss")], model)
    assert model.losses == []


@pytest.mark.parametrize("pruned", [False, True])
def test_a_checkpoint_of_the_dense_phase_is_worse_than_any_of_the_compressed_one(tmp_path, pruned):
    """Also where the metric can be negative, and the mode is only known from its name."""

    class Odd(ToyNet):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", -1000.0 if pruned else 1e6)

    best = saver(tmp_path, monitor="compressed_val_loss")
    run = trainer(tmp_path, [compression(tmp_path, metric="val_loss"), best], enable_checkpointing=True)
    run.fit(Odd(), datamodule=Corners())
    assert best.best_model_path.endswith("epoch=4.ckpt")


def test_a_threshold_of_divergence_on_the_compressed_metric_is_refused(tmp_path):
    stop = EarlyStopping("compressed_val_acc", mode="max", divergence_threshold=0.1)
    with pytest.raises(ValueError, match=r"divergence_threshold=\.\.\.\) would end the fit at once"):
        fit(tmp_path, [compression(tmp_path, metric="val_acc"), stop])


def test_a_metric_that_a_validation_did_not_log_is_not_passed_off_as_of_its_weights(tmp_path):
    class Sometimes(ToyNet):
        def validation_step(self, batch, batch_idx):
            if self.current_epoch < 4:
                self.log("val_acc", 0.9)

    callback = compression(tmp_path, metric="val_acc", export="best", mode="max")
    with pytest.warns(UserWarning, match="no validation measured the metric after compression was done"):
        _, run = fit(tmp_path, [callback], Sometimes())

    assert float(run.callback_metrics["compressed_val_acc"]) < -1e37
    assert callback.report.compressed.accuracy is None
