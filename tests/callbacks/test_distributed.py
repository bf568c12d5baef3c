"""Several processes compress as one would, tell the caller, and end together when one of them is lost."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_xai_compress import RelevanceScoring, Scoring, score
from lightning_xai_compress.formats import load_compressed

from distributed_runs import TokenNet, Tokens
from toy import Corners, ToyNet, fit

pytestmark = pytest.mark.xdist_group("distributed")  # fits are launched once for many tests
TESTS = Path(__file__).resolve().parents[1]
PROGRAMS = Path(__file__).with_name("distributed_runs.py")
TWO_GPUS = pytest.param(
    "gpu",
    marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: the same under nccl"),
)
HARDWARE = ["cpu", TWO_GPUS]
SUMMED = ("lrp", "deeplift", "taylor", "fisher", "wanda")


def launch(program, folder, accelerator, timeout=300):
    """Run a program to its end, and to that of all processes that it started: they hold its output open."""
    return subprocess.run(
        [sys.executable, PROGRAMS, program, folder, accelerator],
        env=os.environ | {"PYTHONPATH": f"{TESTS}", "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def ranks(folder, name):
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=True, map_location="cpu") for rank in range(2)]


def assert_equal(first, second, *parts):
    for part in parts:
        assert first[part].keys() == second[part].keys()
        for name, tensor in first[part].items():
            torch.testing.assert_close(tensor, second[part][name], rtol=0, atol=0, equal_nan=True, msg=f"{part} {name}")


def without_paths(report):
    return {**report, "artifacts": [{**each, "path": ""} for each in report["artifacts"]]}


@pytest.fixture(scope="module", params=HARDWARE)
def ddp(request, tmp_path_factory):
    """All fits of one launch of ddp: the folder, and what the program said."""
    folder = tmp_path_factory.mktemp("ddp")
    result = launch("ddp", folder, request.param)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result, request.param


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "taught",
        "accumulated",
        "averaged",
        "unused",
        "uneven",
        "accuracy",
        "sick",
        "failing",
        "whole",
        "resumed_4",
    ],
)
def test_both_ranks_of_ddp_end_with_the_same_weights_masks_and_bits(ddp, name):
    first, second = ranks(ddp[0], name)

    assert_equal(first, second, "weights", "keep", "bits")
    assert first["history"] == second["history"]
    if name not in ("sick", "failing"):
        assert first["report"]["sparsity"] == 0.5
        assert first["bits"]


@pytest.mark.slow
@pytest.mark.parametrize("run", [*SUMMED, "magnitude", "random", "mean"])
def test_scores_of_two_processes_are_those_of_one_on_all_samples(ddp, run):
    folder, _, accelerator = ddp
    first, second = ranks(folder, f"score_{run}")
    torch.manual_seed(0)
    criterion, settings = ("deeplift", {"baseline": "mean"}) if run == "mean" else (run, {})
    expected = score(ToyNet(), [Corners().data.tensors], criterion, seed=0, **settings)

    assert_equal(first, second, "score", "relevance", "sensitivity")
    assert first["samples"] == expected.samples == (64 if criterion in SUMMED else 0)
    for part in ("score", "relevance", "sensitivity"):
        for name, tensor in getattr(expected, part).items():
            scale = float(tensor.abs().max())
            loose = (
                {"rtol": 1e-4, "atol": 1e-6 * scale} if accelerator == "cpu" else {"rtol": 0.01, "atol": 0.01 * scale}
            )
            torch.testing.assert_close(first[part][name], tensor, **loose, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.slow
def test_each_process_scores_other_batches_and_one_may_have_none(ddp):
    folder, _, _ = ddp
    torch.manual_seed(0)
    expected = score(ToyNet(), [Corners(16).data.tensors])

    first, second = ranks(folder, "score_few")

    assert_equal(first, second, "score", "relevance", "sensitivity")
    assert (first["samples"], first["batches"]) == (second["samples"], second["batches"]) == (16, 1)
    for name, tensor in expected.relevance.items():
        torch.testing.assert_close(first["relevance"][name], tensor, rtol=0.01, atol=0.01 * float(tensor.abs().max()))
    assert ranks(folder, "score_lrp")[0]["batches"] == 4  # 64 samples in batches of 16, not two times


@pytest.mark.slow
def test_a_criterion_of_the_user_sees_all_samples_on_every_rank(ddp):
    for rank in ranks(ddp[0], "score_own"):
        assert {float(each) for tensor in rank["score"].values() for each in tensor.flatten()} == {64.0}


@pytest.mark.slow
def test_weights_are_unknown_where_no_rank_reached_them(ddp):
    folder, _, _ = ddp
    stage = RelevanceScoring(relevance_epochs=[0], scoring=Scoring(samples=8))
    fit(folder / "one", [stage], TokenNet, data=Tokens(), max_epochs=1)

    first, second = ranks(folder, "score_tokens")

    known = ~stage.scores.score["first.weight"].isnan().all(1)
    assert 0 < known.sum() < 16
    assert_equal(first, second, "score", "relevance", "sensitivity")
    assert torch.equal(~first["score"]["first.weight"].isnan().all(1), known)
    torch.testing.assert_close(
        first["score"]["first.weight"][known], stage.scores.score["first.weight"][known], rtol=0.01, atol=1e-7
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sick", r"relevance is not finite: .* \(in process 1\)"),
        ("failing", r"weights could not be scored: no idea \(in process 1\)"),
    ],
)
def test_what_one_rank_alone_cannot_score_halts_all_alike(ddp, name, reason):
    first, second = ranks(ddp[0], name)

    assert re.fullmatch(reason, first["halted"])
    assert first["halted"] == second["halted"] == first["report"]["halted"]
    assert first["report"]["sparsity"] == 0


@pytest.mark.slow
def test_both_ranks_lose_the_same_channels(ddp):
    folder, _, _ = ddp
    first, second = ranks(folder, "channels")

    assert_equal(first, second, "weights", "keep", "bits")
    assert first["history"] == second["history"]
    small = load_compressed(folder / "channels" / "model.safetensors", ToyNet())
    assert small.first.out_channels + small.second.out_channels <= 0.6 * 16
    whole = ToyNet()
    whole.load_state_dict(first["weights"])
    x = Corners().data.tensors[0]
    torch.testing.assert_close(small.eval()(x), whole.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_there_is_one_set_of_files_one_table_and_one_report_on_all_ranks(ddp):
    folder, result, _ = ddp
    first, second = ranks(folder, "plain")

    fits = len(list(folder.glob("*/report.json")))
    assert fits == 13
    assert result.stdout.count("report: ") == fits
    assert result.stdout.count("estimated size") == fits + len(list(folder.glob("score_*.0.pt")))
    assert first["report"] == second["report"]
    assert json.loads((folder / "plain" / "report.json").read_text()) == json.loads(json.dumps(first["report"]))
    reloaded = load_compressed(folder / "plain" / "model.safetensors", ToyNet())
    assert all(torch.equal(tensor, first["weights"][name]) for name, tensor in reloaded.state_dict().items())


@pytest.mark.slow
def test_a_metric_under_ddp_counts_every_validation_sample_once(ddp):
    """65 samples on two ranks: the sampler repeats one of them."""
    folder, _, _ = ddp
    counted = ranks(folder, "uneven")[0]["report"]
    measured = ranks(folder, "accuracy")[0]

    assert counted["dense"]["accuracy"] == counted["compressed"]["accuracy"] == counted["int8_accuracy"] == 65
    model = load_compressed(folder / "accuracy" / "model.safetensors", ToyNet()).eval()
    x, y = Corners(65).data.tensors
    with torch.no_grad():
        expected = multiclass_accuracy(model(x), y, 4, average="micro")
    assert measured["report"]["compressed"]["accuracy"] == pytest.approx(float(expected), abs=1e-6)
    assert 0.25 < expected < 1


@pytest.mark.slow
def test_the_dense_model_teaches_under_ddp(ddp):
    plain, taught = ranks(ddp[0], "plain")[0], ranks(ddp[0], "taught")[0]

    assert taught["report"]["sparsity"] == plain["report"]["sparsity"] == 0.5
    assert not torch.equal(plain["weights"]["first.weight"], taught["weights"]["first.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_ddp_run_equals_the_uninterrupted_one(ddp, step):
    """Step 4 of 12 lies within pruning, step 8 after the quantization."""
    folder, _, accelerator = ddp
    for whole, resumed in zip(ranks(folder, "whole"), ranks(folder, f"resumed_{step}"), strict=True):
        if accelerator == "cpu":
            assert_equal(whole, resumed, "weights")
        assert_equal(whole, resumed, "keep", "bits")
        assert without_paths(whole["report"]) == without_paths(resumed["report"])
    later = [event["event"] for event in whole["history"] if event["epoch"] >= step / 2]
    assert later[-1:] == (["quantized"] if step == 4 else [])


@pytest.mark.slow
def test_a_folder_that_only_the_writing_rank_tries_is_refused_on_all(ddp):
    first, second = ranks(ddp[0], "refused")

    assert re.fullmatch(r"export_dir .*file.out cannot be written .*: name another folder \(in process 0\)", first)
    assert first == second


@pytest.mark.slow
def test_tensor_parallel_is_refused_on_all_ranks_before_training(ddp):
    for text, batches in ranks(ddp[0], "parallel"):
        assert text.startswith("ModelParallelStrategy is not supported: weights must be whole on every device")
        assert text.endswith(
            "use Trainer(strategy='auto') for one device, or strategy='ddp' or 'ddp_spawn' for several"
        )
        assert batches == 0


@pytest.fixture(scope="module", params=HARDWARE)
def spawned(request, tmp_path_factory):
    """The fits of one program in workers: the folder, what its own process saw, and what it said."""
    folder = tmp_path_factory.mktemp("spawn")
    result = launch("spawn", folder, request.param)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, torch.load(folder / "caller.pt", weights_only=False, map_location="cpu"), result


@pytest.mark.slow
def test_both_ranks_of_ddp_spawn_end_with_the_same_weights_masks_and_bits(spawned):
    first, second = ranks(spawned[0], "spawn")

    assert_equal(first, second, "weights", "keep", "bits")
    assert first["report"]["sparsity"] == 0.5
    assert first["bits"]


@pytest.mark.slow
def test_scores_of_two_workers_are_those_of_one_process_on_all_samples(spawned):
    first, second = ranks(spawned[0], "score_spawn")
    torch.manual_seed(0)
    expected = score(ToyNet(), [Corners().data.tensors])

    assert_equal(first, second, "score", "relevance", "sensitivity")
    assert (first["samples"], first["batches"]) == (64, 4)
    for name, tensor in expected.relevance.items():
        torch.testing.assert_close(first["relevance"][name], tensor, rtol=0.01, atol=0.01 * float(tensor.abs().max()))


@pytest.mark.slow
def test_after_ddp_spawn_the_caller_has_the_report_and_the_compressed_weights(spawned):
    folder, seen, result = spawned
    first, _ = ranks(folder, "spawn")

    written = json.loads((folder / "spawn" / "report.json").read_text())
    fork = ranks(folder, "fork")[0]["report"]

    assert json.loads(json.dumps(seen["report"])) == json.loads(json.dumps(first["report"]))
    assert seen["same_again"]
    assert_equal(seen, first, "weights")
    assert written == json.loads(json.dumps(ranks(folder, "unread")[0]["report"]))  # the last fit wrote there again
    assert fork["history"] != seen["report"]["history"]
    assert json.loads(json.dumps(seen["report_of_fork"])) == json.loads(json.dumps(fork))
    assert result.stdout.count("report: ") == 4


@pytest.mark.slow
def test_after_ddp_spawn_the_weights_equal_the_reloaded_file(spawned):
    _, seen, _ = spawned
    reloaded = load_compressed(spawned[0] / "first.safetensors", ToyNet())

    assert_equal(seen, {"weights": reloaded.state_dict()}, "weights")
    assert (seen["weights"]["second.weight"] == 0).float().mean() > 0.2


@pytest.mark.slow
def test_a_fit_in_workers_that_fails_leaves_no_report_of_an_earlier_one(spawned):
    _, seen, _ = spawned

    assert "RuntimeError: stop" in seen["raised"]
    assert "RuntimeError: stop" in seen["raised_again"]
    assert seen["report_after_raising"] is None
    assert seen["report_after_raising_unread"] is None


@pytest.mark.slow
def test_fast_dev_run_in_workers_reports_and_leaves_nothing_behind(spawned):
    _, seen, _ = spawned
    (artifact,) = seen["report_of_trial"]["artifacts"]

    assert artifact["bytes"] > 0
    assert not Path(artifact["path"]).exists()
    assert not list(Path(artifact["path"]).parents[1].glob(f"lightning_xai_compress-*-{seen['pid']}.json"))


LOST = {
    "training 1": [1, -9],
    "training 0": [-9, 1],
    "scoring 1": [1, -9],
    "sums 1": [1, -9],
    "export 1": [1, -9],
    "exception 1": [1, 1],
    "exception 0": [1, 1],
    "folder 0": [1, 1],
}


@pytest.fixture(scope="module", params=HARDWARE)
def lost(request, tmp_path_factory):
    """Fits that lose a process: their ends, and that of a program that Lightning has launched."""
    folder = tmp_path_factory.mktemp("lost")
    result = launch("lost", folder, request.param)
    seconds = time.time() - (folder / "begun").stat().st_mtime
    ends = json.loads((folder / "ends.json").read_text()) if request.param == "cpu" else {}
    return ends, result, seconds


@pytest.mark.slow
@pytest.mark.parametrize("moment", LOST)
def test_a_lost_process_ends_the_other_one_with_an_error_within_a_minute(lost, moment):
    ends, _, _ = lost
    if not ends:
        pytest.skip("nccl waits for its own timeout where nobody watches the processes")

    assert ends[moment]["codes"] == LOST[moment]
    assert ends[moment]["seconds"] < 60


@pytest.mark.slow
def test_a_program_that_loses_a_process_ends_with_an_error_within_a_minute(lost):
    _, result, seconds = lost

    assert result.returncode != 0
    assert seconds < 60
    assert "`Trainer.fit` stopped" not in result.stderr
