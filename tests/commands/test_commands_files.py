"""`inspect` and `verify`: what a file holds, and whether it is a checkpoint's model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_xai_compress.formats import FORMATS, Contents, Inputs, Stored, save
from lightning_xai_compress.plan import CompressionPlan, Mask

SHAPE = ("--input-shape", "3,1,6,6")


def test_inspect_tells_layers_totals_and_the_rest(compressed, run):
    path = compressed / "again/model.pt2"
    code, out, err = run("inspect", path, "--json")

    assert (code, err) == (0, "")
    told = json.loads(out)
    state = torch.load(compressed / "last.ckpt", weights_only=True)["state_dict"]
    assert (told["file"], told["format"], told["bytes"]) == (str(path), "pt2", path.stat().st_size)
    assert [layer["name"] for layer in told["layers"]] == ["first.weight", "second.weight", "head.weight"]
    zeros = bits = 0
    for layer in told["layers"]:
        weight = state[layer["name"]]
        assert layer["shape"] == list(weight.shape)
        assert sum(layer["bits"].values()) == len(weight)
        assert layer["sparsity"] == pytest.approx(float((weight == 0).float().mean()), abs=1e-5)
        zeros += int((weight == 0).sum())
        bits += sum(int(width) * rows * weight[0].numel() for width, rows in layer["bits"].items())
    assert {entry["name"] for entry in told["not_quantized"]} == state.keys() - {
        layer["name"] for layer in told["layers"]
    }
    assert told["totals"]["quantized"] == 776
    assert told["totals"]["sparsity"] == pytest.approx(zeros / 776, abs=1e-5)
    assert told["totals"]["average_bits"] == pytest.approx(bits / 776, abs=1e-3)
    assert 0 < told["totals"]["tensor_bytes"] < told["bytes"]
    assert told["provenance"]["model"] == "ToyNet"


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx", "model.pt2"])
def test_inspect_reads_every_format(compressed, run, name):
    code, out, err = run("inspect", compressed / "again" / name)

    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{compressed / 'again' / name}: {Path(name).suffix[1:]}, ")
    average = json.loads((compressed / "report.json").read_text())["average_bits"]
    told = f"776 are quantized, with {average:.2f} bits on average" in out
    assert told or name == "model.onnx"  # which has fewer widths
    assert next(line for line in lines if line.startswith("second.weight")).split()[1] == "8x8x3x3"
    assert any(line.startswith("head.bias") for line in lines)


def test_inspect_prints_what_a_reader_finds(tmp_path, run, monkeypatch):
    tensors = (
        Stored("fc.weight", torch.tensor([[0.0, 1.0], [2.0, 0.0]]), {2: 1, 8: 1}, 3),
        Stored("fc.bias", torch.zeros(2), {}, 8),
    )
    contents = Contents(tensors, {"torch": "2.14.1"})
    monkeypatch.setitem(FORMATS, "safetensors", replace(FORMATS["safetensors"], read=lambda _: contents))
    (tmp_path / "m.safetensors").write_bytes(b"x" * 20)
    monkeypatch.chdir(tmp_path)

    assert run("inspect", "m.safetensors") == (
        0,
        "m.safetensors: safetensors, 20 bytes\n"
        "6 numbers in 2 tensors, of 11 bytes\n"
        "4 are quantized, with 5.00 bits on average; 50.0% of these are zero\n"
        "\n"
        "layer      shape  sparsity  bits: rows  bytes\n"
        "---------  -----  --------  ----------  -----\n"
        "fc.weight    2x2     50.0%     2:1 8:1      3\n"
        "\n"
        "not quantized  shape    dtype  sparsity  bytes\n"
        "-------------  -----  -------  --------  -----\n"
        "fc.bias            2  float32    100.0%      8\n"
        "\n"
        "torch: 2.14.1\n",
        "",
    )


def test_inspect_refuses_damaged_missing_and_unknown_files(compressed, tmp_path, run):
    for name in ("model.safetensors", "model.onnx", "model.pt2"):
        (tmp_path / name).write_bytes((compressed / "again" / name).read_bytes()[:-9])
        code, out, err = run("inspect", tmp_path / name)
        assert (code, out) == (1, ""), name
        assert err.startswith("error: "), name
    code, _, err = run("inspect", tmp_path / "none.pt2")
    assert (code, err) == (1, f"error: expected a file, got {tmp_path / 'none.pt2'}, which is none\n")
    code, _, err = run("inspect", tmp_path / "model.bin")
    assert code == 1
    assert "expected a file that ends in one of .onnx, .pt2, .safetensors" in err


# --- verify


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt2"])
def test_verify_compares_tensors_without_a_model(compressed, run, name):
    path = compressed / "again" / name

    assert run("verify", path, "--against", compressed / "last.ckpt") == (
        0,
        "largest difference of a weight: 0\nthe same\n",
        "",
    )
    code, out, _ = run("verify", path, "--against", compressed / "epoch=6.ckpt")
    assert code == 1
    assert "differs: first.weight" in out
    assert float(out.splitlines()[0].rpartition(" ")[2]) > 0


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx", "model.pt2"])
def test_verify_with_a_model_runs_the_file(compressed, run, name):
    arguments = ("verify", compressed / "again" / name, "--model", "toy:ToyNet", *SHAPE, "--against")

    code, out, err = run(*arguments, compressed / "last.ckpt")
    assert (code, err) == (0, "")
    assert out.endswith("the same\n")
    assert "largest difference of the " in out
    code, out, err = run(*arguments, compressed / "epoch=6.ckpt")
    assert (code, err) == (1, "")
    assert "differs: " in out


def test_verify_names_tensors_that_one_side_lacks(compressed, tmp_path, run):
    checkpoint = torch.load(compressed / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["extra"] = checkpoint["state_dict"].pop("head.bias")
    torch.save(checkpoint, tmp_path / "other.ckpt")

    code, out, _ = run("verify", compressed / "again/model.pt2", "--against", tmp_path / "other.ckpt")

    assert (code, out) == (1, "largest difference of a weight: inf\ndiffers: extra, head.bias\n")


def test_verify_of_onnx_asks_for_the_model(compressed, run):
    code, _, err = run("verify", compressed / "again/model.onnx", "--against", compressed / "last.ckpt")

    assert code == 1
    assert "give --model module:Class, so that outputs can be compared" in err


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(1))


@pytest.mark.parametrize("name", ["safetensors", "pt2"])
def test_verify_takes_tied_weights_for_the_same(tmp_path, run, name):
    model = Tied()
    plan = CompressionPlan(Mask({"embed.weight": torch.ones(6, 4, dtype=torch.bool)}))
    save(model, plan, tmp_path, formats=[name], examples=[Inputs((torch.zeros(2, 3, dtype=torch.long),))])
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tied.ckpt")

    code, out, _ = run("verify", tmp_path / f"model.{name}", "--against", tmp_path / "tied.ckpt")

    assert (code, out.splitlines()[-1]) == (0, "the same")


def test_verify_of_onnx_compares_the_rows_of_weights(compressed, tmp_path, run):
    """With 8-bit activations outputs say little."""
    np.save(tmp_path / "batch.npy", np.random.default_rng(0).standard_normal((64, 1, 6, 6)).astype(np.float32))
    inputs = ("--model", "toy:ToyNet", "--inputs", tmp_path / "batch.npy")
    run(
        *("export", compressed / "last.ckpt", *inputs, "--format", "onnx", "--activations", "int8"),
        *("--output", tmp_path),
    )
    checkpoint = torch.load(compressed / "last.ckpt", weights_only=True)
    assert run("verify", tmp_path / "model.onnx", "--against", compressed / "last.ckpt", *inputs)[0] == 0

    weight = checkpoint["state_dict"]["second.weight"]
    row = int((weight != 0).flatten(1).any(1).nonzero()[0])
    weight[row, 0] += 0.05 * float(weight[row].abs().max())
    torch.save(checkpoint, tmp_path / "other.ckpt")
    code, out, _ = run("verify", tmp_path / "model.onnx", "--against", tmp_path / "other.ckpt", *inputs)

    assert (code, out.strip()) == (1, "differs: second.weight")


@pytest.mark.parametrize("values", [np.full((2, 1, 6, 6), np.nan, np.float32), np.zeros((0, 1, 6, 6), np.float32)])
def test_verify_with_inputs_that_prove_nothing_is_not_the_same(compressed, tmp_path, run, values):
    np.save(tmp_path / "batch.npy", values)

    code, out, _ = run(
        *("verify", compressed / "again/model.onnx", "--against", compressed / "last.ckpt"),
        *("--model", "toy:ToyNet", "--inputs", tmp_path / "batch.npy"),
    )

    assert code == 1
    assert "the same" not in out


@pytest.mark.parametrize("name", ["safetensors", "pt2"])
def test_inspect_counts_shared_tensors_once_and_lists_all_names(tmp_path, run, name):
    model = Tied()
    plan = CompressionPlan(Mask({"embed.weight": torch.ones(6, 4, dtype=torch.bool)}))
    save(model, plan, tmp_path, formats=[name], examples=[Inputs((torch.zeros(2, 3, dtype=torch.long),))])

    told = json.loads(run("inspect", tmp_path / f"model.{name}", "--json")[1])

    assert told["totals"]["numbers"] == 24
    assert [each["name"] for each in told["not_quantized"]] == ["embed.weight", "head.weight"]
    assert [each["bytes"] > 0 for each in told["not_quantized"]] == [True, False]
