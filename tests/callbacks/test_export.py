"""What the export stage writes: which weights, in which formats, and what their bytes compare with."""

import json
import warnings

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import zstandard
from safetensors.torch import save
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import ArtifactError, CompressedExport, Files, load_compressed
from lightning_xai_compress.callbacks.best import Best

from toy import Corners, ToyNet, compression, fit, trainer


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


class Recorder(ToyNet):
    """Remembers its state at each validation, and logs a number that it is given."""

    def __init__(self, values=()):
        super().__init__()
        self.values, self.seen = list(values), []

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("number", self.values[len(self.seen)])
            self.seen.append({name: tensor.clone() for name, tensor in self.state_dict().items()})


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [("max", [9, 9, 9, 9, 1, 1, 3, 2], 6), ("min", [0, 0, 0, 0, 2, 2, 1, 1], 6), ("max", [5] * 8, None)],
)
def test_the_best_compressed_weights_are_exported_and_the_last_stay(tmp_path, mode, values, best):
    model = Recorder(values)
    callback = compression(tmp_path, metric="number", export="best", mode=mode)

    fit(tmp_path, [callback], model)

    quantized = next(event["epoch"] for event in callback.report.history if event["event"] == "quantized")
    best = int(quantized) if best is None else best  # the first of equals
    assert best + 1 >= quantized
    stored = load_compressed(tmp_path / "model.safetensors")
    for name, tensor in model.seen[best].items():
        assert torch.equal(stored[name], tensor), name
    for name, tensor in model.seen[-1].items():
        assert torch.equal(model.state_dict()[name], tensor), name
    report = report_of(tmp_path)
    assert report["exported_epoch"] == best + 1
    assert report["compressed"]["accuracy"] == values[best]


def test_a_torchmetrics_metric_says_itself_what_is_best(tmp_path):
    callback = compression(tmp_path, metric=MulticlassAccuracy(4), export="best")

    fit(tmp_path, [callback])

    stored = load_compressed(tmp_path / "model.safetensors", ToyNet()).eval()
    images, labels = Corners().data.tensors
    with torch.no_grad():
        accuracy = MulticlassAccuracy(4)(stored(images), labels)
    assert report_of(tmp_path)["compressed"]["accuracy"] == pytest.approx(float(accuracy))
    assert report_of(tmp_path)["exported_epoch"] is not None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"export": "first"}, "export must be 'last' or 'best', got 'first'"),
        ({"export": "best"}, "export='best' needs metric=: what best means"),
        ({"export": "best", "metric": "val_acc"}, "needs mode='max' or 'min': 'val_acc' does not tell"),
        ({"export": "best", "metric": "val_acc", "mode": "up"}, "mode must be 'max' or 'min', got 'up'"),
    ],
)
def test_what_best_means_must_be_known(settings, match):
    with pytest.raises(ValueError, match=match):
        CompressedExport(**settings)


def test_nan_is_never_best():
    best, model = Best("min"), nn.Linear(1, 1)

    assert not best.beaten_by(float("nan"))
    best.keep(1.0, 1, model, {})
    assert not best.beaten_by(float("nan"))
    assert not best.beaten_by(1.0)
    assert best.beaten_by(0.5)


def test_sizes_are_of_real_files_plain_and_under_zstd(tmp_path):
    class Dense(Recorder):
        def on_train_epoch_start(self):
            if self.trainer.current_epoch == 2:  # compression begins with the first batch of this epoch
                self.dense = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    model = Dense([0.0] * 8)
    callback = compression(tmp_path, formats=("safetensors", "onnx"))
    fit(tmp_path, [callback], model)

    def zstd(data):
        return len(zstandard.ZstdCompressor(level=19).compress(data))

    sizes, dense = report_of(tmp_path)["sizes"], save(model.dense)
    assert sizes["dense"]["fp32"] == len(dense) == report_of(tmp_path)["dense"]["bytes"]
    assert sizes["dense"]["fp32_zstd"] == zstd(dense)
    assert sizes["dense"]["int8"] < len(dense) / 1.8  # 776 of its weights, and the header
    assert sizes["dense"]["int8_zstd"] < sizes["dense"]["int8"]
    for name, filename in (("safetensors", "model.safetensors"), ("onnx", "model.onnx")):
        assert sizes["zstd"][name] == zstd((tmp_path / filename).read_bytes())
    entropy = 0.0
    for name, scale in callback.session.latent.scales.items():
        step = torch.where(scale > 0, scale, 1.0).view(-1, *[1] * (model.get_parameter(name).dim() - 1))
        codes = (model.get_parameter(name).detach() / step).round()
        share = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
        entropy -= float((share * share.log2()).sum()) * codes.numel() / 8
    assert sizes["code_entropy"] == pytest.approx(entropy, rel=1e-6)


def test_float16_rounds_in_the_model_and_stays_exact(tmp_path):
    folders = tmp_path / "float", tmp_path / "half"
    models = []
    for folder, half in zip(folders, (False, True), strict=True):
        model, _ = fit(folder, [compression(folder, files=Files(float16=half))])
        models.append(model)

    plain, rounded = (model.state_dict() for model in models)
    stored = load_compressed(folders[1] / "model.safetensors")
    for name, tensor in rounded.items():
        assert torch.equal(stored[name], tensor), name
        if tensor.is_floating_point() and not name.endswith(("first.weight", "second.weight", "head.weight")):
            assert torch.equal(tensor, plain[name].half().float()), name
        else:
            assert torch.equal(tensor, plain[name]), name
    assert not torch.equal(plain["head.bias"], rounded["head.bias"])
    sizes = [(folder / "model.safetensors").stat().st_size for folder in folders]
    assert sizes[1] < sizes[0]


class Untraceable(ToyNet):
    def forward(self, x):
        return super().forward(x if float(x.sum()) > -1e9 else -x)


def test_what_cannot_be_traced_is_said_before_training_and_the_packed_file_is_written(tmp_path):
    class Watch(Untraceable):
        def on_train_batch_start(self, batch, batch_idx):
            told.append(len(caught))

    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, [compression(tmp_path, formats=("safetensors", "onnx", "pt2"))], Watch())

    early = [str(each.message) for each in caught[: told[0]]]
    assert any("'onnx' and 'pt2' will probably not be written: Watch could not be traced" in text for text in early)

    report = report_of(tmp_path)
    assert [each["format"] for each in report["artifacts"]] == ["safetensors"]
    assert [each["name"] for each in report["failed"]] == ["onnx", "pt2"]
    assert all("could not be traced" in each["reason"] for each in report["failed"])
    assert not (tmp_path / "model.onnx").exists()
    assert load_compressed(tmp_path / "model.safetensors", Untraceable()) is not None


def test_where_no_file_would_be_left_training_does_not_begin(tmp_path):
    model = Untraceable()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(ArtifactError, match="Untraceable could not be traced"):
        fit(tmp_path, [compression(tmp_path, formats=("onnx",))], model)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_report_says_which_criterion_made_the_file(tmp_path):
    from lightning_xai_compress.formats import FORMATS

    fit(tmp_path, [compression(tmp_path, formats=("safetensors", "onnx", "pt2"), criterion="magnitude")])

    for name in ("safetensors", "onnx", "pt2"):
        provenance = FORMATS[name].read(tmp_path / FORMATS[name].filename).provenance
        assert provenance["criterion"] == "magnitude", name
        assert provenance["model"] == "ToyNet"


class Tokens(ToyNet):
    """An embedding, attention and a transposed convolution: all compressed, all exported."""

    def __init__(self):
        super().__init__()
        del self.first, self.norm, self.second
        self.embed = nn.Embedding(40, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        tokens = ((x.flatten(1) + 1) * 8).clamp(0, 30).long()  # 31 and more are never seen
        hidden = self.embed(tokens)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.head(F.relu(self.up(hidden.transpose(1, 2))).mean(2))


def test_embeddings_attention_and_transposed_convolutions_are_compressed(tmp_path):
    model, _ = fit(tmp_path, [compression(tmp_path, formats=("safetensors", "onnx", "pt2"))], Tokens())

    report = report_of(tmp_path)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert set(layers) == {
        "embed.weight", "attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "head.weight",
    }  # fmt: skip
    assert all(layer["bits"] for layer in layers.values())
    assert layers["attention.in_proj_weight"]["sparsity"] > 0
    unseen = model.embed.weight[31:]
    assert bool(unseen.any(1).all())  # unknown relevance is never pruned
    assert [each["format"] for each in report["artifacts"]] == ["safetensors", "onnx", "pt2"]
    assert report["artifacts"][0]["max_abs_diff"] == report["artifacts"][2]["max_abs_diff"] == 0.0


def test_widths_that_the_onnx_file_may_not_hold_are_refused_before_training(tmp_path):
    model = ToyNet()
    with pytest.raises(ValueError, match=r"up to 8 bits, but onnx_bits=\(2, 4\) allows at most 4"):
        fit(tmp_path, [compression(tmp_path, formats=("onnx",), files=Files(onnx_bits=(2, 4)))], model)
    assert model.losses == []

    fit(tmp_path, [compression(tmp_path, formats=("onnx",), files=Files(onnx_bits=(2, 4)), bits=(2, 3, 4))])
    assert (tmp_path / "model.onnx").exists()


def test_8_bit_activations_without_an_onnx_file_are_refused():
    with pytest.raises(ValueError, match=r"activations='int8' is a way to write ONNX, but formats=\['safetensors'\]"):
        CompressedExport(files=Files(activations="int8"))


def test_the_best_weights_are_rounded_too(tmp_path):
    files = Files(float16=True)
    model = Recorder([0, 0, 0, 0, 9, 1, 1, 1])

    fit(tmp_path, [compression(tmp_path, metric="number", export="best", mode="max", files=files)], model)

    stored = load_compressed(tmp_path / "model.safetensors")
    assert torch.equal(stored["head.bias"], model.seen[4]["head.bias"].half().float())
    assert torch.equal(stored["head.weight"], model.seen[4]["head.weight"])


class TwoInputs(ToyNet):
    """A batch whose members `split_batch` takes for something else; the module says what forward takes."""

    def __init__(self):
        super().__init__()
        self.example_input_array = (torch.zeros(2, 1, 6, 6), torch.zeros(2, 4))

    def forward(self, x, shift):
        return super().forward(x) + shift

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0], torch.zeros(len(batch[0]), 4)), batch[1])

    def relevance_step(self, batch, batch_idx):
        logits = self(batch[0], torch.zeros(len(batch[0]), 4))
        return logits[torch.arange(len(logits)), batch[1]]

    def validation_step(self, batch, batch_idx):
        pass


def test_the_example_input_array_is_used_where_a_batch_does_not_fit_forward(tmp_path):
    fit(tmp_path, [compression(tmp_path, formats=("safetensors", "onnx", "pt2"))], TwoInputs())

    assert [each["format"] for each in report_of(tmp_path)["artifacts"]] == ["safetensors", "onnx", "pt2"]


def test_without_one_training_does_not_begin(tmp_path):
    model = TwoInputs()
    model.example_input_array = None

    with pytest.raises(ValueError, match="the model's input is not known: set example_input_array"):
        fit(tmp_path, [compression(tmp_path, formats=("onnx",))], model)


class AnyLength(ToyNet):
    """Means over as many rows as a batch has."""

    def __init__(self):
        super().__init__()
        del self.first, self.norm, self.second
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.fc(x)).mean(1))


def test_sizes_that_differ_between_batches_are_dynamic(tmp_path):
    images, labels = Corners().data.tensors
    batches = [(images[i : i + 8, 0, : 3 + i // 8 % 3], labels[i : i + 8]) for i in range(0, 64, 8)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    torch.manual_seed(0)
    model = AnyLength()
    run = trainer(tmp_path, [compression(tmp_path, formats=("onnx", "pt2"))])
    run.fit(model, train_dataloaders=loader, val_dataloaders=loader)

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(5, 11, 6)
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(program(x), expected)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)


def test_best_by_another_metric_begins_anew():
    best, model = Best("min", "val_loss"), nn.Linear(1, 1)
    best.keep(0.1, 3, model, {})
    other = Best("max", "acc")

    with pytest.warns(UserWarning, match="begins anew: the checkpoint's best was by min val_loss, not max acc"):
        other.load(best.state())
    assert other.value is None
    again = Best("min", "val_loss")
    again.load(best.state())
    assert (again.value, again.epoch) == (0.1, 3)


def test_bfloat16_is_refused_for_onnx_before_training(tmp_path):
    model = ToyNet()
    with pytest.raises(ArtifactError, match="onnxruntime has no bfloat16 kernels on the CPU"):
        fit(tmp_path, [compression(tmp_path, formats=("onnx",))], model, precision="bf16-true")
    assert model.losses == []


def test_a_metric_that_is_not_a_number_is_null_in_the_report(tmp_path):
    fit(tmp_path, [compression(tmp_path, metric="number")], Recorder([float("nan")] * 8))

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert report["compressed"]["accuracy"] is None


def test_ranges_from_the_example_input_array_are_warned_of_before_training(tmp_path):
    model = TwoInputs()
    callback = compression(tmp_path, formats=("onnx",), files=Files(activations="int8"))

    with pytest.warns(UserWarning, match="8-bit activations come from example_input_array alone"):
        fit(tmp_path, [callback], model, max_epochs=4)
