"""`export`: every format from a checkpoint alone; models, checkpoints and inputs that do not fit are refused."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_xai_compress import ArtifactError, load_compressed
from lightning_xai_compress.commands.inputs import find_inputs, inputs_of_file, inputs_of_shapes, parse_shape
from lightning_xai_compress.formats import FORMATS
from lightning_xai_compress.formats.pt2 import read_pt2

from toy import ToyNet

SHAPE = ("--input-shape", "3,1,6,6")


def test_export_writes_every_format_and_prints_bytes_and_differences(compressed, tmp_path, run):
    code, out, err = run(
        *("export", compressed / "last.ckpt", "--model", "toy:ToyNet", "--output", tmp_path),
        *("--format", "safetensors", "onnx", "pt2", *SHAPE),
    )

    assert (code, err) == (0, "")
    header, _, *rows = out.splitlines()
    assert header.split() == ["file", "bytes", "max", "abs", "diff"]
    for row, name in zip(rows, ("model.safetensors", "model.onnx", "model.pt2"), strict=True):
        path, size, difference = row.split()
        assert path == str(tmp_path / name)
        assert int(size.replace(",", "")) == (tmp_path / name).stat().st_size
        assert float(difference) < 1e-5
    expected = torch.load(compressed / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in load_compressed(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, expected[name])


def test_the_same_checkpoint_gives_the_same_bytes(compressed, tmp_path, run):
    for folder in (tmp_path / "one", tmp_path / "two"):
        code, *_ = run(
            *("export", compressed / "last.ckpt", "--model", "toy:ToyNet", "--output", folder),
            *("--format", "safetensors", "pt2", "onnx", *SHAPE),
        )
        assert code == 0

    for name in ("model.safetensors", "model.onnx", "model.pt2"):
        digests = [hashlib.sha256((tmp_path / side / name).read_bytes()).digest() for side in ("one", "two")]
        assert digests[0] == digests[1], name


def test_an_early_checkpoint_gives_an_earlier_model(compressed, tmp_path, run):
    code, *_ = run(
        "export",
        compressed / "epoch=3.ckpt",
        "--model",
        "toy:ToyNet",
        "--output",
        tmp_path,
        "--format",
        "pt2",
        *SHAPE,
    )

    assert code == 0
    stored = {entry.name: entry for entry in read_pt2(tmp_path / "model.pt2").tensors}
    weights = torch.load(compressed / "epoch=3.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(stored["second.weight"].values, weights["second.weight"])
    assert not any(entry.bits for entry in stored.values())


def test_onnx_bits_and_float16_change_the_files(compressed, tmp_path, run):
    code, *_ = run(
        *("export", compressed / "last.ckpt", "--model", "toy:ToyNet", "--output", tmp_path, *SHAPE),
        *("--format", "safetensors", "onnx", "--onnx-bits", "4,8", "--float16"),
    )

    assert code == 0
    widths = {width for entry in FORMATS["onnx"].read(tmp_path / "model.onnx").tensors for width in entry.bits}
    assert widths == {4, 8}
    rounded = load_compressed(tmp_path / "model.safetensors")["norm.running_mean"]
    full = torch.load(compressed / "last.ckpt", weights_only=True)["state_dict"]["norm.running_mean"]
    assert torch.equal(rounded, full.half().float())
    assert not torch.equal(rounded, full)
    against = ("verify", tmp_path / "model.safetensors", "--against", compressed / "last.ckpt")
    assert run(*against)[0] == 1
    assert run(*against, "--float16")[0] == 0


def test_a_format_that_fails_costs_no_other(compressed, tmp_path, run, monkeypatch):
    def fail(*_):
        raise ArtifactError("no onnx today")

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=fail))

    code, out, err = run(
        *("export", compressed / "last.ckpt", "--model", "toy:ToyNet", "--output", tmp_path, *SHAPE),
        *("--format", "onnx", "safetensors"),
    )

    assert code == 1
    assert err == "error: onnx was not written: no onnx today\n"
    assert "model.safetensors" in out
    assert not (tmp_path / "model.onnx").exists()


# --- models


class Wide(ToyNet):
    """Needs an argument that the checkpoint does not know."""

    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(32, classes)


class Plain(nn.Module):
    """The same names as ToyNet, without Lightning."""

    def __init__(self, bias=True):
        super().__init__()
        toy = ToyNet()
        self.first, self.norm, self.second, self.head = toy.first, toy.norm, toy.second, nn.Linear(32, 4, bias=bias)
        self.calls = toy.forward

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.nn.functional.avg_pool2d(torch.relu(self.second(x)), 3).flatten(1))


NO_MODEL = 7


@pytest.mark.parametrize(
    ("model", "settings"), [("Wide", ["classes=4"]), ("Plain", []), ("Plain", ["bias=true"])], ids=str
)
def test_settings_and_plain_modules_give_the_same_file(compressed, tmp_path, run, model, settings):
    init = ["--init", *settings] if settings else []

    code, _, err = run(
        "export", compressed / "last.ckpt", "--model", f"test_commands_export:{model}", "--output", tmp_path, *init
    )

    assert (code, err) == (0, "")
    one, other = (load_compressed(folder / "model.safetensors") for folder in (tmp_path, compressed / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


REFUSED_MODELS = {
    "toy": "--model: expected module:Class, got 'toy'; for models.py with class Net write models:Net",
    "toyz:Net": r"module 'toyz' cannot be imported from .*No module named 'toyz'; change to the folder",
    "toy:Net": "--model toy:Net: toy has no 'Net'; it has TiedNet, ToyNet",
    "test_commands_export:NO_MODEL": "expected a class, got a int; name the class of the model",
    "json:dumps": r"json:dumps cannot be built: TypeError: .*; give what its __init__ needs as --init name=value",
    "builtins:dict": r"expected a torch\.nn\.Module, got a dict; name its class",
    "test_commands_export:Wide": r"Wide cannot be built: TypeError: .*'classes'; give what its __init__ needs as",
    "torch.nn:Identity": r"torch\.nn:Identity: the checkpoint has first\.weight, head\.bias, head\.weight "
    "and 7 more, torch.nn:Identity has no others; give the LightningModule of the fit",
}


@pytest.mark.parametrize("model", REFUSED_MODELS)
def test_a_model_that_cannot_be_used_is_refused_with_the_reason(compressed, tmp_path, run, model):
    code, out, err = run("export", compressed / "last.ckpt", "--model", model, "--output", tmp_path / "no")

    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    with pytest.raises(AssertionError, match=REFUSED_MODELS[model]):
        raise AssertionError(err)
    assert not (tmp_path / "no").exists()


def test_another_size_of_the_model_is_refused(compressed, tmp_path, run):
    for model, setting in (("Wide", "classes=5"), ("Plain", "bias=false")):
        code, _, err = run(
            *("export", compressed / "last.ckpt", "--model", f"test_commands_export:{model}", "--init", setting),
            *("--output", tmp_path),
        )

        assert code == 1
        assert f"last.ckpt is of another model than test_commands_export:{model}: " in err
        assert "\n" not in err.strip()


def test_a_setting_without_a_name_is_refused(compressed, run):
    code, _, err = run("export", compressed / "last.ckpt", "--model", "toy:ToyNet", "--init", "4")

    assert code == 1
    assert err == "error: --init: expected name=value, got '4'; write for example --init width=64\n"


# --- checkpoints


class Marker:
    """A type of the user's."""


def test_a_checkpoint_with_objects_needs_trust(compressed, tmp_path, run):
    checkpoint = torch.load(compressed / "last.ckpt", weights_only=True)
    checkpoint["callbacks"]["Mine"] = {"marker": Marker()}
    torch.save(checkpoint, tmp_path / "objects.ckpt")
    arguments = ("export", tmp_path / "objects.ckpt", "--model", "toy:ToyNet", "--output", tmp_path)

    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert "holds test_commands_export.Marker, expected tensors and plain types" in err
    assert "If you trust the file, add --trust" in err
    assert not (tmp_path / "model.safetensors").exists()
    assert run(*arguments, "--trust")[0] == 0
    assert (tmp_path / "model.safetensors").exists()


def test_bad_checkpoints_are_refused(compressed, tmp_path, run):
    (tmp_path / "torn.ckpt").write_bytes((compressed / "last.ckpt").read_bytes()[:3000])
    torch.save([1, 2], tmp_path / "list.ckpt")
    refusals = {
        tmp_path / "none.ckpt": "which is no file: give one of ModelCheckpoint's",
        tmp_path / "torn.ckpt": "got a file that torch.load cannot read (",
        tmp_path / "list.ckpt": "expected a Lightning checkpoint, got a list; give a .ckpt",
        compressed
        / "epoch=0.ckpt": "nothing was pruned or quantized yet when this checkpoint was saved (epoch 0, step 4)",
    }
    for path, reason in refusals.items():
        code, out, err = run("export", path, "--model", "toy:ToyNet", "--output", tmp_path / "no")
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert reason in err


# --- inputs


def test_inputs_come_from_files_shapes_and_the_module(tmp_path):
    x, ids = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([[1, 2]])
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x, ids=ids)
    save_file({"x": torch.from_numpy(x)}, tmp_path / "x.safetensors")

    assert torch.equal(inputs_of_file(tmp_path / "x.npy").args[0], torch.from_numpy(x))
    assert torch.equal(inputs_of_file(tmp_path / "x.npz").kwargs["ids"], torch.from_numpy(ids))
    assert list(inputs_of_file(tmp_path / "x.safetensors").kwargs) == ["x"]
    first, second = inputs_of_shapes(["2,3", "i64:1,4"]).args
    assert (first.shape, first.dtype) == ((2, 3), torch.float32)
    assert torch.equal(second, torch.zeros(1, 4, dtype=torch.int64))
    assert torch.equal(first, inputs_of_shapes(["f32:2,3"]).args[0])
    model = nn.Linear(2, 2)
    for example, args, kwargs in ((x, 1, None), ((x, ids), 2, None), ({"x": x}, 0, {"x": x})):
        model.example_input_array = example
        found = find_inputs(model, None, [])
        assert (len(found.args), found.kwargs) == (args, kwargs)


@pytest.mark.parametrize("text", ["", "1,a", "f16:1,2", "1,0", "1,,2", "-1"])
def test_a_shape_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"expected a shape such as 1,3,32,32, or i64:1,16 for token ids, got"):
        parse_shape(text)


def test_input_files_that_cannot_be_read_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "x.txt").write_text("1")

    for name in ("objects.npy", "torn.npz", "bad.safetensors"):
        with pytest.raises(ValueError, match=r"cannot be read: .*; save plain arrays of numbers"):
            inputs_of_file(tmp_path / name)
    with pytest.raises(ValueError, match=r"expected \.npy, \.npz or \.safetensors, got .*x\.txt"):
        inputs_of_file(tmp_path / "x.txt")
    with pytest.raises(FileNotFoundError, match="expected a file"):
        inputs_of_file(tmp_path / "none.npy")


def test_without_inputs_the_error_names_the_three_ways(compressed, tmp_path, run):
    code, _, err = run(
        "export", compressed / "last.ckpt", "--model", "toy:ToyNet", "--format", "pt2", "--output", tmp_path
    )

    assert code == 1
    assert "give --inputs FILE" in err
    assert "or --input-shape 1,3,32,32" in err
    assert "or set example_input_array" in err


def test_random_inputs_give_no_activation_ranges(compressed, run):
    code, _, err = run(
        *("export", compressed / "last.ckpt", "--model", "toy:ToyNet", "--format", "onnx"),
        *("--activations", "int8", *SHAPE),
    )

    assert code == 1
    assert "give real ones with --inputs FILE instead of --input-shape" in err


def test_the_last_checkpoint_gives_the_very_file_that_the_fit_ended_with(compressed):
    """`compressed` holds what the callback wrote, and `again` what the command made of last.ckpt."""
    assert (compressed / "again/model.safetensors").read_bytes() == (compressed / "model.safetensors").read_bytes()
