"""The main job on scikit-learn's digits: a dense fit, a compressed fit, and the file loaded back.

python examples/demo.py [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lightning_xai_compress import XAICompression
from lightning_xai_compress.tables import table

from data import DigitsData
from models import DigitsNet
from runner import Outcome, compare, threads

EPOCHS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--export-dir", type=Path, default=Path("artifacts/demo"))
    parser.add_argument("--formats", nargs="+", default=["safetensors", "onnx"])
    arguments = parser.parse_args()
    began = time.perf_counter()
    outcomes = []
    for seed in arguments.seeds:
        folder = arguments.export_dir if len(arguments.seeds) == 1 else arguments.export_dir / f"seed{seed}"
        outcomes.append(
            compare(
                DigitsNet,
                lambda seed: DigitsData(batch_size=32, seed=seed),
                lambda directory: XAICompression(
                    sparsity=0.8,
                    average_bits=3.0,
                    metric="val_acc",
                    export_dir=directory,
                    formats=arguments.formats,
                ),
                epochs=EPOCHS,
                seed=seed,
                folder=folder,
                quiet=True,
            )
        )
    print(f"\nscikit-learn digits, {EPOCHS} epochs each, 400 test images ({threads()})\n")
    print(outcome_table(outcomes))
    print(f"\nfiles: {arguments.export_dir}; {time.perf_counter() - began:.0f} s in all")


def outcome_table(outcomes: list[Outcome]) -> str:
    """One row a seed, and their mean."""
    rows = [_row(f"seed {each.seed}", [each]) for each in outcomes]
    if len(outcomes) > 1:
        rows.append(_row("mean", outcomes))
    header = ("", "dense %", "compressed %", "lost", "dense bytes", "bytes", "smaller", "times", "reload difference")
    return table(header, rows)


def _row(label: str, outcomes: list[Outcome]) -> list[str]:
    def mean(name: str) -> float:
        return sum(float(getattr(each, name)) for each in outcomes) / len(outcomes)

    return [
        label,
        f"{mean('dense_accuracy'):.2f}",
        f"{mean('accuracy'):.2f}",
        f"{mean('lost'):+.2f}",
        f"{mean('dense_bytes'):,.0f}",
        f"{mean('bytes'):,.0f}",
        f"{mean('reduction'):.2%}",
        f"{mean('dense_bytes') / mean('bytes'):.1f}x",
        f"{max(each.reload_difference for each in outcomes):g}",
    ]


if __name__ == "__main__":
    main()
