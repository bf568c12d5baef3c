"""Arguments, help, and the program as a process."""

import subprocess
import sys

import pytest

SHAPE = ("--input-shape", "3,1,6,6")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required: command"),
        (["shrink"], "invalid choice: 'shrink'"),
        (["export", "x.ckpt"], "the following arguments are required: --model"),
        (["export", "x.ckpt", "--model", "a:B", "--format", "zip"], "invalid choice: 'zip'"),
        (["export", "x.ckpt", "--model", "a:B", "--input-shape", "1;2"], "expected a shape such as 1,3,32,32"),
        (["export", "x.ckpt", "--model", "a:B", "--onnx-bits", "x"], "expected widths such as 4,8, got 'x'"),
        (["export", "x.ckpt", "--model", "a:B", "--inputs", "a.npy", *SHAPE], "not allowed with argument --inputs"),
        (["verify", "x.pt2"], "the following arguments are required: --against"),
    ],
)
def test_wrong_arguments_end_with_code_2(run, arguments, reason):
    code, out, err = run(*arguments)

    assert (code, out) == (2, "")
    assert reason in err


def test_widths_that_onnx_lacks_are_refused(compressed, run):
    code, _, err = run("export", compressed / "last.ckpt", "--model", "toy:ToyNet", "--onnx-bits", "3")

    assert code == 1
    assert err.startswith("error: onnx_bits must be some of (2, 4, 8)")


HELPS = {
    "": ("export", "inspect", "verify", "exit codes", "2  the arguments are wrong"),
    "export": ("--trust", "--init", "--inputs", "i64:1,16", "default: compressed", "--ranges", "--float16"),
    "inspect": ("--json", "Nothing in it is run"),
    "verify": ("--against", "bit for bit", "Running a .pt2 means trusting it"),
}


@pytest.mark.parametrize("command", HELPS)
def test_help_names_what_there_is(run, command):
    code, out, err = run(*command.split(), "--help")

    assert (code, err) == (0, "")
    for text in HELPS[command]:
        assert text in " ".join(out.split()) or text in out


def test_the_module_runs_as_a_program_and_ends_with_its_code(tmp_path):
    path = tmp_path / "none.pt2"
    command = [sys.executable, "-W", "ignore", "-m", "lightning_xai_compress", "inspect", str(path)]

    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: expected a file, got {path}, which is none\n"


@pytest.mark.parametrize("source", ["def broken(:\n", "raise RuntimeError('no GPU here')\n"])
def test_a_module_that_fails_to_import_is_one_line(compressed, tmp_path, run, source, monkeypatch):
    (tmp_path / "failing_models.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    code, _, err = run("export", compressed / "last.ckpt", "--model", "failing_models:Net", "--output", tmp_path)

    assert code == 1
    assert err.startswith("error: --model failing_models:Net: 'failing_models' fails to import: ")
    assert err.count("\n") == 1


def test_8_bit_activations_without_onnx_are_refused(compressed, tmp_path, run):
    code, _, err = run(
        *("export", compressed / "last.ckpt", "--model", "toy:ToyNet", "--activations", "int8", "--output", tmp_path)
    )

    assert code == 1
    assert "--activations is a way to write ONNX" in err
