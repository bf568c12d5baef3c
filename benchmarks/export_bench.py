"""What the files weigh, how exactly they give the model back, and how fast onnxruntime runs them.

    python benchmarks/export_bench.py [--quick] [--rounds N] [--epochs N] [--output FILE.json]

| model | what |
|---|---|
| fashion | the Fashion-MNIST network of the examples, trained with compression for a few epochs |
| resnet18 | torchvision's, at 128x128, randomly initialised, BatchNorm statistics of random images |
| transformer | 4 encoder layers of width 256 with 8 heads on 64 tokens of a vocabulary of 8192, randomly initialised |

The plan of the latter two: half the weights zero (the smaller half of each layer), every output channel on 2, 4 or 8
bits, at random. The fashion network decides for itself (half the weights zero, 2, 4 or 8 bits, 4 on average).

Latencies are medians over rounds of the ratio within a round, where a round runs each file in turn, several times: fp32
is the same model as a plain float ONNX file under default options; "folded" the weight-only file with integers that are
dequantized once at loading (`onnx_session`); "int8" the file with 8-bit activations under default options. All on two
threads in one process. "fp32_again" is the fp32 file opened a second time: how far from 1 its ratio is tells the noise.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import zstandard
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import CompressionPlan, Files, Inputs, load_compressed, save
from lightning_xai_compress.formats import code_entropy, packed_size
from lightning_xai_compress.formats.onnx import onnx_session

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from common import RESULTS, Results, environment, paired, ratio
from data import FashionMNISTData
from export_models import MODELS, SEED, bit_packed, compress, fp32, train_fashion
from runner import silence

UPPER = {
    "int8_latency_resnet18_b1": 0.45,
    "int8_latency_resnet18_b16": 0.5,
    "int8_latency_transformer_b16": 0.6,
    "int8_size_over_weight_only": 1.02,
    "int8_accuracy_drop": 0.3,
    "folded_latency_resnet18_b1": 1.0,
    "folded_relative_error": 1e-5,
    "packed_over_entropy": 1.01,
    "metadata_share_resnet18": 0.01,
    "packed_over_zstd_bitpacked": 1.0,
    "packed_over_zstd_onnx": 1.0,
    "reload_difference": 0.0,
    "decode_memory": 2.0,
}
LOWER = {"decode_mb_per_s": 50.0}
THREADS = 2


@dataclass(frozen=True)
class Settings:
    """How long it takes."""

    rounds: int = 31
    epochs: int = 4
    train_samples: int = 55_000
    runs: int = 20  # of a session in a round, at batch 1; a quarter of that at batch 16


QUICK = Settings(rounds=3, epochs=2, train_samples=4_000, runs=2)


def export(model: nn.Module, plan: CompressionPlan, examples: list[Tensor], folder: Path) -> dict[str, Any]:
    """All files of a model, with their bytes and differences."""
    inputs = [Inputs((example,)) for example in examples]
    found: dict[str, Any] = {}
    for kind, formats, files in (
        ("plain", ("safetensors", "onnx", "pt2"), Files()),
        ("int8", ("onnx",), Files(activations="int8")),
    ):
        for artifact in save(model, plan, folder / kind, formats=formats, examples=inputs, files=files):
            label = artifact.format if kind == "plain" else f"{artifact.format}_int8"
            found[label] = {"bytes": artifact.bytes, "difference": artifact.max_abs_diff}
    fp32(model, examples[0], folder / "fp32.onnx")
    found["onnx_fp32"] = {"bytes": (folder / "fp32.onnx").stat().st_size}
    return found


def sizes(model: nn.Module, plan: CompressionPlan, folder: Path) -> dict[str, Any]:
    """Where the bytes of the packed file go, and what they compare with."""
    size = packed_size(model, plan)
    bitpacked = bit_packed(model, plan)
    zstd = zstandard.ZstdCompressor(level=19)
    return {
        "packed": size.total,
        "payload": size.payload,
        "scales": size.scales,
        "rest": size.rest,
        "metadata": size.metadata,
        "code_entropy": code_entropy(model, plan),
        "bitpacked": len(bitpacked),
        "bitpacked_zstd19": len(zstd.compress(bitpacked)),
        "onnx_zstd19": len(zstd.compress((folder / "plain" / "model.onnx").read_bytes())),
        "pt2_zstd19": len(zstd.compress((folder / "plain" / "model.pt2").read_bytes())),
    }


def latency(folder: Path, make_inputs: Callable[[int, int], Tensor], settings: Settings) -> dict[str, Any]:
    """Paired times of the three files at batch 1 and 16, as ratios to fp32."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = THREADS
    providers = ["CPUExecutionProvider"]
    sessions = {
        "fp32": onnxruntime.InferenceSession(str(folder / "fp32.onnx"), options, providers=providers),
        "fp32_again": onnxruntime.InferenceSession(str(folder / "fp32.onnx"), options, providers=providers),
        "folded": onnx_session(folder / "plain" / "model.onnx", threads=THREADS),
        "default_options": onnxruntime.InferenceSession(
            str(folder / "plain" / "model.onnx"), options, providers=providers
        ),
        "int8": onnxruntime.InferenceSession(str(folder / "int8" / "model.onnx"), options, providers=providers),
    }
    found: dict[str, Any] = {}
    for batch in (1, 16):
        feed = make_inputs(batch, 7).numpy()
        runs = settings.runs if batch == 1 else max(1, settings.runs // 4)

        def task(session: Any, feed: Any = feed, runs: int = runs) -> Callable[[], None]:
            name = session.get_inputs()[0].name

            def run() -> None:
                for _ in range(runs):
                    session.run(None, {name: feed})

            return run

        tasks = {name: task(session) for name, session in sessions.items()}
        for warm_up in tasks.values():
            warm_up()
        times = paired(tasks, rounds=settings.rounds)
        base = times["fp32"].wall
        found[f"batch_{batch}"] = {
            name: {
                "milliseconds": 1000 * statistics.median(timing.wall) / runs,
                "ratio": ratio(timing.wall, base),
                "wall": timing.wall,
            }
            for name, timing in times.items()
        }
    return found


def decoding(path: Path, rounds: int) -> dict[str, float]:
    """Speed and memory of reading a packed file, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        state = load_compressed(path)
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values()) / 1e6
    return {
        "float_megabytes": megabytes,
        "seconds": statistics.median(seconds),
        "mb_per_s": megabytes / statistics.median(seconds),
        "peak_over_model": decode_peak(path) / (1e6 * megabytes),
    }


def decode_peak(path: Path) -> float:
    """Resident memory that decoding adds at its peak, in a fresh process that has decoded once before."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); import gc, torch; torch.set_num_threads(1)\n"
        "from lightning_xai_compress import load_compressed; from common import resident_peak\n"
        "load_compressed(sys.argv[3]); gc.collect()\n"
        "print(resident_peak(lambda: load_compressed(sys.argv[1])))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = nn.Sequential(nn.Linear(4, 4))
        save(model, compress(model), folder)
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                script,
                str(path),
                str(Path(__file__).parent),
                str(Path(folder) / "model.safetensors"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    return float(done.stdout)


@torch.no_grad()
def accuracies(model: nn.Module, data: FashionMNISTData, folder: Path) -> dict[str, float]:
    """Test accuracy in percent: of the module, and of the files that onnxruntime runs."""
    sessions = {kind: onnx_session(folder / kind / "model.onnx", threads=THREADS) for kind in ("plain", "int8")}
    metrics = {name: MulticlassAccuracy(10, average="micro") for name in ("module", *sessions)}
    data.setup("test")
    for batch, labels in data.test_dataloader():
        metrics["module"].update(model(batch), labels)
        for kind, session in sessions.items():
            logits = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
            metrics[kind].update(torch.from_numpy(logits), labels)
    return {name: 100 * float(metric.compute()) for name, metric in metrics.items()}


def checks_of(models: Mapping[str, Any]) -> dict[str, float]:
    def speed(name: str, kind: str, batch: int) -> float:
        return float(models[name]["latency"][f"batch_{batch}"][kind]["ratio"])

    files = {name: entry["files"] for name, entry in models.items()}
    size = {name: entry["sizes"] for name, entry in models.items()}
    resnet = size["resnet18"]
    return {
        "int8_latency_resnet18_b1": speed("resnet18", "int8", 1),
        "int8_latency_resnet18_b16": speed("resnet18", "int8", 16),
        "int8_latency_transformer_b16": speed("transformer", "int8", 16),
        "int8_size_over_weight_only": files["resnet18"]["onnx_int8"]["bytes"] / files["resnet18"]["onnx"]["bytes"],
        "int8_accuracy_drop": models["fashion"]["accuracy"]["module"] - models["fashion"]["accuracy"]["int8"],
        "folded_latency_resnet18_b1": speed("resnet18", "folded", 1),
        "folded_relative_error": max(entry["onnx"]["difference"] for entry in files.values()),
        "packed_over_entropy": max(entry["payload"] / entry["code_entropy"] for entry in size.values()),
        "metadata_share_resnet18": resnet["metadata"] / resnet["packed"],
        "packed_over_zstd_bitpacked": max(entry["packed"] / entry["bitpacked_zstd19"] for entry in size.values()),
        "packed_over_zstd_onnx": max(entry["packed"] / entry["onnx_zstd19"] for entry in size.values()),
        "decode_mb_per_s": min(models[name]["decoding"]["mb_per_s"] for name in MODELS),
        "decode_memory": max(models[name]["decoding"]["peak_over_model"] for name in MODELS),
        "reload_difference": max(
            entry[each]["difference"] for entry in files.values() for each in ("safetensors", "pt2")
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What the files weigh, how exact they are, and how fast they run.")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds and a short training, only to see that it runs"
    )
    parser.add_argument("--rounds", type=int, help="of timing")
    parser.add_argument("--epochs", type=int, help="of the Fashion-MNIST network")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings()
    for name in ("rounds", "epochs"):
        if getattr(arguments, name) is not None:
            settings = replace(settings, **{name: getattr(arguments, name)})
    torch.set_num_threads(THREADS)
    silence()
    output = arguments.output or RESULTS / f"export{'_quick' if arguments.quick else ''}.json"
    results = Results(output, environment=environment([SEED]), settings=asdict(settings), limits={**UPPER, **LOWER})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, (make, make_inputs) in MODELS.items():
            torch.manual_seed(SEED)
            model = make()
            plan = compress(model)
            examples = [make_inputs(2, 1), make_inputs(16, 2)]
            results.add("models", label, files=export(model, plan, examples, folder / label))
            results.add("models", label, sizes=sizes(model, plan, folder / label))
            results.add(
                "models", label, decoding=decoding(folder / label / "plain" / "model.safetensors", settings.rounds)
            )
            results.add("models", label, latency=latency(folder / label, make_inputs, settings))
        fashion, plan, data = train_fashion(settings.epochs, settings.train_samples, folder / "fit")
        some = next(iter(data.val_dataloader()))[0]
        results.add("models", "fashion", files=export(fashion, plan, [some[:2], some[:256]], folder / "fashion"))
        results.add("models", "fashion", sizes=sizes(fashion, plan, folder / "fashion"))
        results.add("models", "fashion", accuracy=accuracies(fashion, data, folder / "fashion"))
    checks = checks_of(results.content["models"])
    results.add(checks=checks)
    print(f"\n{'check':32}{'measured':>12}{'limit':>10}")
    for name, value in checks.items():
        low = name in LOWER
        good = value >= LOWER[name] if low else value <= UPPER[name]
        limit = f"{'>=' if low else '<='}{(LOWER if low else UPPER)[name]:g}"
        print(f"{name:32}{value:12.4g}{limit:>10}{'' if good else '  missed'}")
    print(f"\n{output}")


if __name__ == "__main__":
    main()
