"""A compressed fit, its checkpoints and files, and a way to run commands on them."""

import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_xai_compress.commands import main

from toy import compression, fit

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def compressed(tmp_path_factory):
    """A folder with checkpoints of a compressed fit, and its files exported again."""
    folder = tmp_path_factory.mktemp("commands")
    checkpoints = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_last=True, save_top_k=-1)
    fit(folder, [compression(folder), checkpoints], enable_checkpointing=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TESTS)
        arguments = ["export", str(folder / "last.ckpt"), "--model", "toy:ToyNet", "--output", str(folder / "again")]
        shape = ["--input-shape", "3,1,6,6"]
        assert main([*arguments, "--format", "safetensors", "onnx", "pt2", *shape]) == 0
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command in the folder of toy.py; gives its code, and what it printed."""
    monkeypatch.chdir(TESTS)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def command(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return command
