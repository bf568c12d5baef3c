"""The examples as a user runs them, each in a process of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, cwd, check=True):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=900, check=False
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def cli(*arguments, cwd, check=True):
    return run(ROOT / "examples" / "cli.py", "fit", *arguments, cwd=cwd, check=check)


@pytest.mark.slow
def test_the_demo_reaches_its_numbers_on_the_mean_of_three_seeds(tmp_path):
    out = run(ROOT / "examples" / "demo.py", "--seeds", "0", "1", "2", cwd=tmp_path).stdout

    mean = next(line for line in out.splitlines() if line.startswith("mean")).split()
    lost, times, difference = float(mean[3]), float(mean[7].removesuffix("x")), float(mean[8])
    assert lost <= 1.0
    assert times >= 15
    assert difference == 0
    for seed in range(3):
        report = json.loads((tmp_path / f"artifacts/demo/seed{seed}/report.json").read_text())
        assert {artifact["format"] for artifact in report["artifacts"]} == {"safetensors", "onnx"}
        assert all(artifact["max_abs_diff"] < 1e-4 for artifact in report["artifacts"])


@pytest.mark.slow
def test_fashion_mnist_shrinks_by_97_percent_even_in_a_short_run(tmp_path):
    """One epoch of the real images; the figures of the full runs are in the README."""
    out = run(ROOT / "examples" / "fashion_mnist.py", "--epochs", "1", "--selection", "least", cwd=tmp_path).stdout

    row = next(line for line in out.splitlines() if line.startswith("seed 0")).split()
    dense, lost, smaller, difference = float(row[2]), float(row[4]), float(row[7].rstrip("%")), float(row[9])
    assert dense > 88
    assert lost < 3
    assert smaller >= 97
    assert difference == 0


@pytest.mark.slow
def test_the_cli_compresses_from_yaml(tmp_path):
    out = cli("-c", ROOT / "examples" / "digits.yaml", cwd=tmp_path).stdout

    report = json.loads((tmp_path / "artifacts/digits/report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert report["metric"] == "MulticlassAccuracy (validation data)"
    assert report["compressed"]["accuracy"] > 0.95
    assert "from epoch" in out


@pytest.mark.slow
def test_the_callback_is_added_on_the_command_line_and_printed_configs_run(tmp_path):
    arguments = [
        "--model=DigitsNet", "--data=DigitsData", "--trainer.max_epochs=2", "--trainer.logger=false",
        "--trainer.callbacks+=XAICompression", "--trainer.callbacks.sparsity=0.7",
        "--trainer.callbacks.pruning.steps=3", "--trainer.callbacks.metric=val_acc",
        "--trainer.callbacks.files.onnx_bits=[4, 8]", "--trainer.callbacks.files.float16=true",
        "--trainer.callbacks.quantization.activations=int8", "--trainer.callbacks.export=best",
        "--trainer.callbacks.mode=max", '--trainer.callbacks.formats=["safetensors", "onnx"]',
    ]  # fmt: skip
    printed = cli(*arguments, "--print_config", cwd=tmp_path).stdout
    settings = yaml.safe_load(printed)["trainer"]["callbacks"][0]
    assert settings["class_path"] == "lightning_xai_compress.XAICompression"
    assert settings["init_args"]["sparsity"] == 0.7
    assert settings["init_args"]["pruning"]["steps"] == 3
    assert settings["init_args"]["files"]["onnx_bits"] == [4, 8]
    (tmp_path / "printed.yaml").write_text(printed)

    cli("-c", "printed.yaml", cwd=tmp_path)

    report = json.loads((tmp_path / "compressed/report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.7, abs=1e-4)
    assert report["exported_epoch"] == 2
    assert [each["format"] for each in report["artifacts"]] == ["safetensors", "onnx"]


def test_a_typo_in_the_config_names_the_key(tmp_path):
    config = (ROOT / "examples" / "digits.yaml").read_text().replace("sparsity:", "sparsty:")
    (tmp_path / "typo.yaml").write_text(config)

    result = cli("-c", "typo.yaml", cwd=tmp_path, check=False)

    assert result.returncode != 0
    assert "sparsty" in result.stderr


def test_the_examples_in_the_readme_name_real_settings():
    import inspect

    from lightning_xai_compress import XAICompression

    readme = (ROOT / "README.md").read_text()
    table = readme.split("| setting |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    named = {name for cell in cells for name in re.findall(r"`([a-z_]+)", cell)}
    assert named == set(inspect.signature(XAICompression).parameters)
