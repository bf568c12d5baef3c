"""LightningCLI, in this process: configs, the command line, printed configs and help."""

import dataclasses
import inspect
import json
import re

import lightning as L
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_xai_compress import Files, Pruning, Quantization, Scoring, XAICompression

from toy import Corners, ToyNet

PATH = "lightning_xai_compress.XAICompression"
TRAINER = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SETTINGS = {
    "sparsity": 0.7,
    "average_bits": 3.5,
    "bits": [2, 4, 8],
    "warmup": "2 steps",
    "pruning_end": 0.5,
    "relevance_epochs": [0, 1],
    "exclude": ["head*"],
    "export": "best",
    "mode": "max",
    "metric": "val_acc",
    "formats": ["safetensors"],
    "scoring": {"samples": 48, "explain": "logit", "statistics": ["rms", "absolute"], "seed": 3},
    "pruning": {"steps": 5},
    "quantization": {"activations": "int8"},
    "files": {"onnx_bits": [4, 8], "float16": True},
}


def cli(*arguments, run=False):
    """The CLI of a user's script; with `run` the first argument is the subcommand."""
    return LightningCLI(ToyNet, Corners, run=run, args=list(arguments), save_config_callback=None)


def config(path, settings, *, name=PATH, key="callbacks"):
    callback = {"class_path": name, "init_args": settings}
    path.write_text(
        yaml.safe_dump({"trainer": TRAINER | {key: [callback]} if key == "callbacks" else {key: [callback]}})
    )
    return path


def compressions(made):
    return [each for each in made.trainer.callbacks if isinstance(each, XAICompression)]


def settings_of(callback):
    """What the settings have become, down in the stages."""
    scoring, pruning, precision, export = callback.stages()
    return {
        "sparsity": pruning.sparsity,
        "average_bits": precision.average_bits,
        "bits": precision.bits,
        "warmup": pruning.start,
        "pruning_end": (pruning.end, precision.start),
        "relevance_epochs": scoring.relevance_epochs,
        "exclude": (pruning.exclude, precision.exclude),
        "metric": export.accuracy.metric,
        "formats": export.formats,
        "scoring": scoring.scoring,
        "pruning": pruning.pruning,
        "quantization": precision.quantization,
        "files": export.files,
    }


EXPECTED = {
    "sparsity": 0.7,
    "average_bits": 3.5,
    "bits": (2, 4, 8),
    "warmup": "2 steps",
    "pruning_end": (0.5, 0.5),
    "relevance_epochs": (0, 1),
    "exclude": (("head*",), ("head*",)),
    "metric": "val_acc",
    "formats": ("safetensors",),
    "scoring": Scoring(samples=48, explain="logit", statistics=["rms", "absolute"], seed=3),
    "pruning": Pruning(steps=5),
    "quantization": Quantization(activations="int8"),
    "files": Files(onnx_bits=[4, 8], float16=True),
}


@pytest.mark.parametrize("name", [PATH, "XAICompression"])
def test_a_config_names_the_class_by_its_path_or_its_short_name(tmp_path, name):
    made = cli("-c", str(config(tmp_path / "config.yaml", SETTINGS, name=name)))

    (callback,) = compressions(made)
    assert settings_of(callback) == EXPECTED


def test_the_callback_and_its_settings_are_added_on_the_command_line(tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump({"trainer": TRAINER}))
    values = {
        f"{key}.{name}" if name else key: value
        for key, given in SETTINGS.items()
        for name, value in (given.items() if isinstance(given, dict) else [("", given)])
    }
    arguments = [
        f"--trainer.callbacks.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
    ]

    made = cli("-c", str(plain), "--trainer.callbacks+=XAICompression", *arguments)

    (callback,) = compressions(made)
    assert settings_of(callback) == EXPECTED


def test_a_second_config_appends_the_callback(tmp_path):
    first = tmp_path / "first.yaml"
    other = {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}
    first.write_text(yaml.safe_dump({"trainer": TRAINER | {"enable_progress_bar": True, "callbacks": [other]}}))
    second = config(tmp_path / "second.yaml", SETTINGS, key="callbacks+")

    made = cli("-c", str(first), "-c", str(second))

    (callback,) = compressions(made)
    assert settings_of(callback) == EXPECTED
    assert any(isinstance(each, L.pytorch.callbacks.TQDMProgressBar) for each in made.trainer.callbacks)


def test_a_printed_config_gives_the_same_settings(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli("-c", str(config(tmp_path / "config.yaml", SETTINGS)), "--print_config")
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)

    made = cli("-c", str(tmp_path / "printed.yaml"))

    (callback,) = compressions(made)
    assert settings_of(callback) == EXPECTED


def test_a_printed_config_without_settings_is_that_of_the_defaults(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli("-c", str(config(tmp_path / "config.yaml", {})), "--print_config")
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)

    made = cli("-c", str(tmp_path / "printed.yaml"))

    (callback,) = compressions(made)
    assert settings_of(callback) == settings_of(XAICompression())
    (entry,) = yaml.safe_load(printed)["trainer"]["callbacks"]
    assert set(entry["init_args"]) == set(inspect.signature(XAICompression).parameters)


@pytest.mark.parametrize("moment", [3, 0.25, "1500 steps", "3 epochs"])
def test_moments_keep_their_kind_in_configs_and_on_the_command_line(tmp_path, moment):
    phases = {"warmup": moment, "pruning_end": moment}
    by_config = cli("-c", str(config(tmp_path / "config.yaml", phases)))
    by_line = cli(
        "-c", str(config(tmp_path / "none.yaml", {})),
        f"--trainer.callbacks.warmup={moment}", f"--trainer.callbacks.pruning_end={moment}",
    )  # fmt: skip

    expected = 3 if moment == "3 epochs" else moment
    for made in (by_config, by_line):
        (callback,) = compressions(made)
        start = callback.stages()[1].start
        assert start == expected
        assert type(start) is type(expected)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"sparsty": 0.5}, "sparsty"),
        ({"scoring": {"sample": 3}}, "sample"),
        ({"pruning": {"stepps": 3}}, "stepps"),
        ({"files": {"float_16": True}}, "float_16"),
        ({"quantization": {"activation": "int8"}}, "activation"),
    ],
)
def test_a_typo_names_the_key(tmp_path, capsys, settings, key):
    with pytest.raises(SystemExit):
        cli("-c", str(config(tmp_path / "config.yaml", settings)))
    assert re.search(rf"\b{key}\b", capsys.readouterr().err)


def test_a_typo_on_the_command_line_names_the_key(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli("-c", str(config(tmp_path / "config.yaml", {})), "--trainer.callbacks.sparsty=0.5")
    assert "sparsty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"sparsity": "much"}, "sparsity"),
        ({"bits": "four"}, "bits"),
        ({"formats": 3}, "formats"),
        ({"selection": "worst"}, "selection"),
        ({"warmup": [1]}, "warmup"),
        ({"scoring": {"samples": "all"}}, "samples"),
    ],
)
def test_a_wrong_type_names_the_key(tmp_path, capsys, settings, key):
    with pytest.raises(SystemExit):
        cli("-c", str(config(tmp_path / "config.yaml", settings)))
    assert re.search(rf"\b{key}\b", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"warmup": "soon"}, "warmup as a text must be a whole number of steps or epochs, such as '1500 steps'"),
        ({"sparsity": 1.5}, "sparsity must lie in [0, 1), got 1.5"),
        ({"pruning": {"steps": 0}}, "pruning steps must be >= 1, got 0"),
    ],
)
def test_a_value_out_of_range_gets_the_error_of_the_setting(tmp_path, capsys, settings, text):
    with pytest.raises((ValueError, SystemExit)) as caught:
        cli("-c", str(config(tmp_path / "config.yaml", settings)))
    assert text in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize("name", ["XAICompression", PATH])
def test_help_lists_every_setting_with_its_text(capsys, name):
    with pytest.raises(SystemExit):
        cli("fit", f"--trainer.callbacks.help={name}", run=True)
    shown = " ".join(capsys.readouterr().out.split())

    documented = re.findall(r"^    (\w+): (.*)$", inspect.getdoc(XAICompression).split("Raises")[0], re.MULTILINE)
    assert {name for name, _ in documented} == set(inspect.signature(XAICompression).parameters)
    for setting, text in documented:
        assert re.search(rf"--\S*{setting}\b", shown), setting
        assert " ".join(text.split())[:40] in shown, setting
    for group, kind in (("scoring", Scoring), ("pruning", Pruning), ("files", Files), ("quantization", Quantization)):
        fields = ", ".join(field.name for field in dataclasses.fields(kind))
        assert f"{kind.__name__}({fields})" in shown, group


def test_a_fit_from_a_config_with_phases_in_steps(tmp_path):
    settings = {"sparsity": 0.5, "average_bits": 3.0, "warmup": "2 steps", "pruning_end": "5 steps"}
    settings |= {"export_dir": str(tmp_path / "out"), "scoring": {"samples": 32}, "pruning": {"steps": 2}}

    made = cli("fit", "-c", str(config(tmp_path / "config.yaml", settings)), run=True)

    (callback,) = compressions(made)
    history = json.loads((tmp_path / "out" / "report.json").read_text())["history"]
    assert [(event["event"], event["epoch"]) for event in history] == [
        ("pruned", 0.5),
        ("pruned", 0.75),
        ("quantized", 1.25),
    ]
    assert callback.report.sparsity == 0.5
