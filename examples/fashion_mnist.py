"""The real 70,000 images of Fashion-MNIST: a dense fit, a compressed fit of the same length, and the file loaded back.

python examples/fashion_mnist.py [--selection nonpositive|least] [--seeds 0]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lightning_xai_compress import XAICompression

from data import FashionMNISTData
from demo import outcome_table
from models import FashionNet
from runner import compare, threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--selection", choices=("nonpositive", "least"), default="nonpositive")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--average-bits", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data-dir", help="folder of the four idx files")
    parser.add_argument("--export-dir", type=Path, default=Path("artifacts/fashion_mnist"))
    parser.add_argument("--formats", nargs="+", default=["safetensors", "onnx"])
    arguments = parser.parse_args()
    began = time.perf_counter()
    outcomes = [
        compare(
            FashionNet,
            lambda seed: FashionMNISTData(batch_size=128, seed=seed, root=arguments.data_dir),
            lambda directory: XAICompression(
                sparsity=arguments.sparsity,
                average_bits=arguments.average_bits,
                selection=arguments.selection,
                metric="val_acc",
                export_dir=directory,
                formats=arguments.formats,
            ),
            epochs=arguments.epochs,
            seed=seed,
            folder=arguments.export_dir / arguments.selection / f"seed{seed}",
        )
        for seed in arguments.seeds
    ]
    print(
        f"\nFashion-MNIST, selection={arguments.selection!r}, {arguments.epochs} epochs each, 10,000 test images "
        f"({threads()})\n"
    )
    print(outcome_table(outcomes))
    fits = ", ".join(f"dense {each.dense_seconds:.0f} s + compressed {each.seconds:.0f} s" for each in outcomes)
    print(f"\nfits: {fits}; {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
