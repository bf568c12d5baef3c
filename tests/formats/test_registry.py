"""Files are put in place when they are complete and proven; until then the old one stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import (
    FORMATS,
    Contents,
    Format,
    Inputs,
    file_format,
    load_compressed,
    register,
    save,
    write_atomically,
)
from lightning_xai_compress.plan import CompressionPlan, Mask


def model_and_plan(size=8):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size))
    return model, CompressionPlan(Mask({"0.weight": torch.ones(size, size, dtype=torch.bool)}))


@pytest.fixture
def text_format():
    """What a new format takes: three functions and an entry."""

    def write(model, plan, path, examples, files):
        path.write_text(" ".join(str(float(value)) for value in model[0].weight.flatten()))

    def check(path, model, examples, files):
        values = torch.tensor([float(word) for word in path.read_text().split()])
        return float((values - model[0].weight.detach().flatten()).abs().max())

    register(Format("text", "model.txt", write=write, check=check, read=lambda path: Contents(())))
    yield
    del FORMATS["text"]


def test_a_format_is_three_functions_and_an_entry(tmp_path, text_format):
    model, plan = model_and_plan()

    (artifact,) = save(model, plan, tmp_path, formats=["text"])

    assert artifact.path == str(tmp_path / "model.txt")
    assert artifact.bytes == (tmp_path / "model.txt").stat().st_size
    assert artifact.max_abs_diff < 1e-6
    assert file_format("anything.txt").name == "text"


def test_files_are_known_by_their_ends():
    assert {name: file_format(entry.filename).name for name, entry in FORMATS.items()} == {
        name: name for name in FORMATS
    }
    with pytest.raises(
        ArtifactError, match=r"model\.bin: expected a file that ends in one of \.onnx, \.pt2, \.safetensors"
    ):
        file_format("model.bin")
    with pytest.raises(ArtifactError, match="expected a file that ends in"):
        file_format("model")


def test_a_file_that_is_not_proven_leaves_the_old_one(tmp_path, text_format, monkeypatch):
    model, plan = model_and_plan()
    save(model, plan, tmp_path, formats=["text"])
    before = (tmp_path / "model.txt").read_bytes()

    def refuse(path, model, examples, files):
        raise ArtifactError("it is another model")

    entry = FORMATS["text"]
    monkeypatch.setitem(FORMATS, "text", Format("text", "model.txt", write=entry.write, check=refuse, read=entry.read))
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(ArtifactError, match="it is another model"):
        save(model, plan, tmp_path, formats=["text"])

    assert (tmp_path / "model.txt").read_bytes() == before
    assert os.listdir(tmp_path) == ["model.txt"]


def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "model.bin"
    write_atomically(target, lambda path: path.write_bytes(b"old"))

    def interrupted(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, interrupted)

    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.bin"]


SCRIPT = """
import sys, resource, signal
from pathlib import Path
import torch
from torch import nn
from lightning_xai_compress import CompressionPlan, Mask, save
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(256, 256))
plan = CompressionPlan(Mask({"0.weight": torch.ones(256, 256, dtype=torch.bool)}))
folder, what = Path(sys.argv[1]), sys.argv[2]
if what == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
if what == "killed":
    from lightning_xai_compress.formats import FORMATS
    entry = FORMATS["safetensors"]
    def write(model, plan, path, examples, files):
        entry.write(model, plan, path, examples, files)
        with path.open("rb+") as file:
            file.truncate(1000)
        (folder / "now").touch()
        import time
        time.sleep(600)
    import dataclasses
    FORMATS["safetensors"] = dataclasses.replace(entry, write=write)
save(model, plan, folder, formats=["safetensors"])
"""


def run(folder, what):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), what], stderr=subprocess.PIPE, text=True)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    model, plan = model_and_plan()
    save(model, plan, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    process = run(tmp_path, "full")
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 1
    assert "ArtifactError" in errors
    assert "model.safetensors could not be written: [Errno 27] File too large" in errors
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process")
@pytest.mark.parametrize("old", [True, False], ids=["old file", "no file"])
def test_a_killed_process_leaves_the_old_file_or_none(tmp_path, old):
    model, plan = model_and_plan()
    if old:
        save(model, plan, tmp_path)
    process = run(tmp_path, "killed")
    waited = time.monotonic() + 120
    while not (tmp_path / "now").exists() and time.monotonic() < waited:
        assert process.poll() is None
        time.sleep(0.05)

    process.kill()
    process.communicate()

    assert (tmp_path / "model.safetensors").exists() == old
    if old:
        assert torch.equal(load_compressed(tmp_path / "model.safetensors")["0.weight"], model[0].weight)
    # the next export goes through, beside what is left of the killed one
    save(model, plan, tmp_path)
    assert torch.equal(load_compressed(tmp_path / "model.safetensors")["0.weight"], model[0].weight)


def test_all_formats_are_written_and_each_is_told_of(tmp_path):
    model, plan = model_and_plan()
    told = []

    artifacts = save(
        model, plan, tmp_path, formats=sorted(FORMATS), examples=[Inputs((torch.randn(2, 8),))], on_written=told.append
    )

    assert told == artifacts
    assert sorted(Path(each.path).name for each in artifacts) == sorted(os.listdir(tmp_path))


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    model, plan = model_and_plan()

    with pytest.raises(ValueError, match=r"formats: expected some of \['onnx', 'pt2', 'safetensors'\], got 'tflite'"):
        save(model, plan, tmp_path / "new", formats=["safetensors", "tflite"])

    assert not (tmp_path / "new").exists()
