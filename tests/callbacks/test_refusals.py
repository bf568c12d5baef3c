"""Bad input gets a clear error before any training."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import (
    CompressedExport,
    CompressionError,
    LatentCopyError,
    MixedPrecision,
    Pruning,
    RelevancePruning,
    RelevanceScoring,
    Scoring,
    XAICompression,
)
from lightning_xai_compress.errors import ArtifactError, RelevanceError

from toy import Corners, ToyNet, compression, fit


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sparsity": 1.0}, "sparsity must lie in [0, 1), got 1.0"),
        ({"sparsity": -0.1}, "sparsity must lie in [0, 1), got -0.1"),
        ({"average_bits": 1.5}, "average_bits must lie between the smallest and the largest of bits=(2, 3, 4, 6, 8)"),
        ({"average_bits": 9.0}, "average_bits must lie between"),
        ({"bits": (1, 4)}, "bits must be whole numbers in 2..8, got (1, 4)"),
        ({"bits": (4, 9), "average_bits": 5}, "bits must be whole numbers in 2..8, got (4, 9)"),
        ({"selection": "worst"}, "selection must be 'nonpositive', 'literal' or 'least', got 'worst'"),
        ({"warmup": 1.0}, "warmup as a share of the fit must lie in [0, 1), got 1.0"),
        ({"pruning_end": -1}, "pruning_end must not be negative, got -1"),
        ({"relevance_epochs": [3, 1]}, "relevance_epochs must be in rising order, got [3, 1]"),
        ({"relevance_epochs": []}, "relevance_epochs must be a list of epochs >= 0"),
        ({"relevance_epochs": 0}, "must be >= 1, got 0"),
        ({"formats": ("tflite",)}, "formats: expected some of ['onnx', 'pt2', 'safetensors'], got 'tflite'"),
        ({"formats": "onnx"}, "formats must be a list of strings such as ['onnx']"),
        ({"exclude": "head*"}, "exclude must be a list of strings such as ['head*']"),
        ({"formats": []}, "formats must name each format once, and at least one, got []"),
        ({"formats": ["onnx", "onnx"]}, "formats must name each format once"),
        ({"sparsity": "0.9"}, "sparsity must be a number, got '0.9'"),
        ({"sparsity": False}, "sparsity must be a number, got False"),
        ({"sparsity": torch.tensor(0.5)}, "sparsity must be a number, got tensor(0.5000)"),
        ({"sparsity": float("nan")}, "sparsity must be finite, got nan"),
        ({"average_bits": "3"}, "average_bits must be a number, got '3'"),
        ({"bits": 4}, "bits must be a list of widths such as [2, 4, 8], got 4"),
        ({"warmup": "3"}, "warmup as a text must be a whole number of steps or epochs, such as '1500 steps'"),
        ({"warmup": None}, "warmup, a whole number of epochs, a share of the fit or a text such as '1500 steps', must"),
        ({"relevance_epochs": True}, "relevance_epochs as a number must be a whole number, got True"),
        ({"relevance_epochs": [1.5]}, "each of relevance_epochs must be a whole number, got 1.5"),
        ({"metric": MulticlassAccuracy}, "(an object, such as MulticlassAccuracy(10), no class and no collection)"),
        ({"metric": 3}, "metric must be the name of one that the module logs, or a torchmetrics metric"),
        ({"export_dir": 3}, "export_dir must be a path, got 3"),
        ({"scoring": {"samples": 3}}, "scoring must be a Scoring(...), got {'samples': 3}"),
        ({"pruning": 3}, "pruning must be a Pruning(...), got 3"),
    ],
)
def test_settings_out_of_range_are_refused_when_made(settings, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        XAICompression(**settings)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Pruning(steps=0), "pruning steps must be >= 1, got 0"),
        (lambda: Scoring(samples=0), "samples must be >= 1, got 0"),
        (lambda: Scoring(epsilon=-1), "epsilon must be >= 0, got -1"),
        (lambda: Scoring(epsilon=float("inf")), "epsilon must be finite, got inf"),
        (lambda: Scoring(samples=2.5), "samples must be a whole number, got 2.5"),
        (lambda: Scoring(seed=2**62), "seed must lie in"),
        (lambda: Pruning(steps=2.5), "pruning steps must be a whole number, got 2.5"),
        (lambda: Scoring(explain="loss"), "explain must be 'margin', 'logit' or 'predicted', got 'loss'"),
    ],
)
def test_stage_settings_out_of_range_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"warmup": 8}, "start of pruning=8 lies past the end of the fit, which has 8 epochs"),
        ({"warmup": 2, "pruning_end": 9}, "end of pruning=9 lies past the end of the fit"),
        ({"warmup": 4, "pruning_end": 2}, "pruning ends (at 2) before it starts (at 4)"),
        ({"selection": "least", "sparsity": None}, "selection='least' needs a sparsity"),
        ({"relevance_epochs": [2, 8]}, "relevance_epochs=[2, 8] reaches past the end of the fit"),
        ({"relevance_epochs": [4, 5]}, "begins after pruning does (epoch 2)"),
        ({"exclude": ["nothing*"]}, "exclude=['nothing*'] matches no layer; names look like: first.weight"),
    ],
)
def test_what_does_not_fit_the_fit_is_refused_before_its_first_batch(tmp_path, settings, text):
    model = ToyNet()
    with pytest.raises(ValueError, match=re.escape(text)):
        fit(tmp_path, [compression(tmp_path, **settings)], model)
    assert model.losses == []


def test_a_model_without_compressible_layers_is_refused(tmp_path):
    class Norms(ToyNet):
        def __init__(self):
            super().__init__()
            self.first = self.second = self.head = nn.Identity()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x):
            return self.norm(x).mean((1, 2))[:, :4]

    model = Norms()
    with pytest.raises(
        CompressionError, match="Norms has nothing to compress: expected at least one Linear, convolution"
    ):
        fit(tmp_path, [compression(tmp_path)], model)
    assert model.losses == []


class Nested(Corners):
    """Batches of a form that only the module's own training step knows."""

    def train_dataloader(self):
        def collate(samples):
            return {"pixels": torch.stack([x for x, _ in samples]), "digit": torch.tensor([y for _, y in samples])}

        return DataLoader(self.data, batch_size=16, collate_fn=collate)


class NestedNet(ToyNet):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["pixels"], batch["digit"]), batch_idx)


def test_a_batch_that_is_not_understood_is_refused_and_relevance_step_named(tmp_path):
    model = NestedNet()
    with pytest.raises(RelevanceError, match=r"got a dict with keys \['digit', 'pixels'\].*Define relevance_step"):
        fit(tmp_path, [compression(tmp_path)], model, Nested())
    assert model.losses == []


def test_a_batch_that_the_model_cannot_take_names_relevance_step(tmp_path):
    class Named(Nested):
        def train_dataloader(self):
            def collate(samples):
                return {"data": torch.stack([x for x, _ in samples]), "label": torch.tensor([y for _, y in samples])}

            return DataLoader(self.data, batch_size=16, collate_fn=collate)

    with pytest.raises(RelevanceError, match=r"could not be called with data=a torch.float32 .*Define relevance_step"):
        fit(tmp_path, [compression(tmp_path)], ToyNet(), Named())


def test_a_stumble_in_the_warm_up_does_not_cost_the_compression(tmp_path):
    class Stumbling(ToyNet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.nan if self.global_step == 1 else loss

    callback = compression(tmp_path)
    with pytest.warns(UserWarning, match="before compression began: loss or gradients are not finite at step 1"):
        fit(tmp_path, [callback], Stumbling())
    assert callback.report.sparsity == 0.5
    assert callback.report.halted == ""


def test_with_relevance_step_the_same_batch_works(tmp_path):
    class Own(NestedNet):
        def relevance_step(self, batch, batch_idx):
            return self(batch["pixels"]).gather(1, batch["digit"].unsqueeze(1))

    callback = compression(tmp_path)
    fit(tmp_path, [callback], Own(), Nested())

    assert callback.report.sparsity == 0.5


def test_onnx_without_a_known_input_asks_for_an_example(tmp_path):
    class Own(NestedNet):
        def relevance_step(self, batch, batch_idx):
            return self(batch["pixels"]).gather(1, batch["digit"].unsqueeze(1))

    with pytest.raises(ValueError, match="set example_input_array on the LightningModule"):
        fit(tmp_path, [compression(tmp_path, formats=["onnx"])], Own(), Nested())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    model = ToyNet()
    with pytest.raises(ArtifactError, match=r"export_dir .*file.out cannot be written .*name another folder"):
        fit(tmp_path, [compression(tmp_path / "file" / "out")], model)
    assert model.losses == []


def test_a_format_whose_extra_is_missing_is_refused(monkeypatch):
    import lightning_xai_compress.formats.registry as registry

    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ImportError, match=r"needs onnxruntime: pip install 'lightning-xai-compress\[onnx\]'"):
        XAICompression(formats=["onnx"])


def test_a_metric_without_validation_data_is_refused(tmp_path):
    class Blind(Corners):
        val_dataloader = None

    with pytest.raises(ValueError, match="metric= is measured on validation data, but this fit has none"):
        fit(tmp_path, [compression(tmp_path, metric=MulticlassAccuracy(4))], data=Blind())


def test_a_metric_that_was_never_logged_is_named_with_those_that_were(tmp_path):
    callback = compression(tmp_path, metric="val_f1")
    with pytest.warns(UserWarning, match=r"metric='val_f1' was never logged.*\['val_acc'\]"):
        fit(tmp_path, [callback])
    assert callback.report.compressed.accuracy is None


def test_lbfgs_is_refused_before_training(tmp_path):
    class Quasi(ToyNet):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    model = Quasi()
    with pytest.raises(LatentCopyError, match="LBFGS"):
        fit(tmp_path, [compression(tmp_path)], model)
    assert model.losses == []


def test_a_fit_of_unknown_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the length of the fit is not known.*Trainer\(max_steps=...\)"):
        fit(tmp_path, [compression(tmp_path)], data=Endless())


class Endless(Corners):
    """A stream that does not know its length: four batches, then the epoch is over."""

    def train_dataloader(self):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(stream):
                return iter(self.data)

        return DataLoader(Stream(), batch_size=16)


def test_a_stream_is_compressed_over_max_steps(tmp_path):
    callback = compression(tmp_path)
    fit(tmp_path, [callback], data=Endless(), max_steps=40, max_epochs=-1)

    steps = [(event["event"], event["epoch"]) for event in callback.report.history]
    assert callback.report.sparsity == 0.5
    # 40 steps are 10 epochs: pruning from step 10 in epoch 2, quantized from step 24 in epoch 6
    assert steps[0] == ("pruned", 2)
    assert len(steps) == 7
    assert steps[-1] == ("quantized", 6)


def test_epochs_as_phases_of_a_stream_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"phases are given in epochs \(2\), but the training data has no length"):
        fit(tmp_path, [compression(tmp_path, warmup=2)], data=Endless(), max_steps=40, max_epochs=-1)


def test_a_stream_that_calibration_would_use_up_is_refused(tmp_path):
    class Once(Corners):
        def train_dataloader(self):
            class Stream(torch.utils.data.IterableDataset):
                def __iter__(stream):
                    return stream

                def __next__(stream):
                    return self.data[0]

            return DataLoader(Stream(), batch_size=16)

    with pytest.raises(ValueError, match=r"Stream.__iter__ returns the dataset itself.*return a new iterator"):
        fit(tmp_path, [compression(tmp_path)], data=Once(), max_steps=4, max_epochs=-1)


def test_the_length_of_a_fit_with_accumulation_counts_the_short_last_window(tmp_path):
    """5 batches an epoch and accumulation of 4 are 2 steps an epoch: 10 steps are 5 epochs."""
    callback = compression(tmp_path, pruning_end=0.7)
    fit(tmp_path, [callback], data=Corners(80), accumulate_grad_batches=4, max_steps=10, max_epochs=-1)

    events = {event["event"]: event["epoch"] for event in callback.report.history}
    assert events["quantized"] == pytest.approx(0.7 * 5, abs=0.21)


class Distilled(ToyNet):
    """A frozen teacher that the explained logits never meet: 2,048 weights of unknown relevance."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(512, 4)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"sparsity": 0.5},
            "sparsity=0.5 cannot be met: relevance reaches only 27.5% of the compressible",
        ),
        (
            {"sparsity": 0.1},
            "average_bits=3.0 cannot be met: relevance does not reach teacher.weight, which keep",
        ),
    ],
)
def test_what_layers_of_unknown_relevance_make_impossible_is_refused_before_training(tmp_path, settings, text):
    model = Distilled()
    with pytest.raises(ValueError, match=re.escape(text)):
        fit(tmp_path, [compression(tmp_path, **settings)], model)
    assert model.losses == []


def test_a_metric_that_gives_several_numbers_is_refused_before_training(tmp_path):
    model = ToyNet()
    with pytest.raises(ValueError, match="metric MulticlassAccuracy must compute one number"):
        fit(tmp_path, [compression(tmp_path, metric=MulticlassAccuracy(4, average=None))], model)
    assert model.losses == []


def test_a_named_metric_of_earlier_weights_is_not_passed_off_as_the_final_one(tmp_path):
    callback = compression(tmp_path, metric="val_acc")
    with pytest.warns(UserWarning, match="metric='val_acc' was last measured at epoch 6, not on the final weights"):
        fit(tmp_path, [callback], check_val_every_n_epoch=3)
    assert callback.report.compressed.accuracy is None


def test_the_same_stage_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the Trainer has RelevancePruning twice: XAICompression already brings all"):
        fit(tmp_path, [compression(tmp_path), RelevancePruning(sparsity=0.5)])


@pytest.mark.parametrize("stage", [RelevanceScoring, RelevancePruning, MixedPrecision, CompressedExport])
def test_stages_take_their_settings_by_name_only(stage):
    with pytest.raises(TypeError):
        stage(0.5)
