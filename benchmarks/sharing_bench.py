"""Layers that share sixteen values: what k-means weighted by relevance is worth against plain k-means, and a grid.

    python benchmarks/sharing_bench.py [--only PATTERN] [--seeds N ...] [--jobs N] [--quick] [--report]
                                       [--output FILE.json] [--cache FOLDER]

Networks of Fashion-MNIST start from the dense checkpoints of `fashion_bench.py`, and "pitch" is the tracker of
`pitch.py` as it was published. Images train on for the same single epoch and tones for 3, by the same recipe, the last
third on the shared values; nothing is pruned. Accuracies are those of the file read back, on the validation data, by
which choices are made, and on the test data, read once. "drop" is against the same epochs without compression.

| kind | what |
|---|---|
| relevance, absolute, fisher, error | codebooks of 15 values (4 bits) with zero, by what weighs k-means |
| blocks | by relevance, a codebook for every 16 output channels |
| grid | 4 bits a weight on a grid with a scale for each output channel |
| KIND:untrained | quantized at the very end of the schedule, after 97 % of the steps |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lightning_xai_compress import Quantization, XAICompression, load_compressed
from lightning_xai_compress.report import dense_bytes

from fashion_cases import MODELS, Case, Study, evaluate, gain, mean_of
from fashion_fit import common_settings, fit_base, load_dense, network, scoring_of, train
from fashion_grid import Recipe
from fashion_tasks import CONTROL, Base

DEFAULT, PLAIN = "relevance", "error"
KINDS = (DEFAULT, "absolute", "fisher", PLAIN, "blocks", "grid", f"{DEFAULT}:untrained", f"{PLAIN}:untrained")
LIMITS = {"codebook16_drop": 0.3, "codebook16_gain_over_plain": 0.0}
_LATE = 0.97  # of the fit


def main() -> None:
    study = Study("sharing", __doc__, LIMITS, taught=True)
    study.work(study.cases(KINDS, quick=(DEFAULT, PLAIN)), run)
    study.tell(checks(study.runs), DEFAULT)


def run(case: Case, recipe: Recipe, cache: Path) -> dict[str, float]:
    """Train; accuracies in percent, and bytes of the file."""
    net = network(case.model, case.seed, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    load_dense(net, case.model, case.seed, recipe, cache)
    control = fit_base(Base(case.model, case.seed, CONTROL), recipe, cache)
    dense, folder = dense_bytes(net), case.folder(cache, "sharing")
    name, _, late = case.kind.partition(":")
    settings = common_settings(recipe) | {"scoring": scoring_of(recipe)} | ({"pruning_end": _LATE} if late else {})
    quantization = Quantization(quantizer="codebook", bits_per="layer")
    if name == "grid":
        quantization = Quantization()
    elif name == "blocks":
        quantization = replace(quantization, codebook_channels=16)
    else:
        quantization = replace(quantization, sensitivity=name)  # type: ignore[arg-type]
    if name == "absolute":
        settings["scoring"] = scoring_of(recipe, statistics=("rms", "absolute"))
    compression = XAICompression(
        sparsity=0.0, bits=(4,), average_bits=4.0, quantization=quantization, export_dir=str(folder), **settings
    )
    train(net, case.seed, recipe, [compression])
    file = folder / "model.safetensors"
    val, test = evaluate(load_compressed(file, network(case.model, case.seed)), case, recipe)
    return {"val": val, "test": test, "drop": control.test - test, "reduction": 1 - file.stat().st_size / dense}


def checks(runs: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The figures that have limits, as far as there is data for them."""
    found: dict[str, float] = {}
    drops = [each for model in MODELS if (each := mean_of(runs, model, DEFAULT, "drop")) is not None]
    if drops:
        found["codebook16_drop"] = max(drops)
    both = (gain(runs, model, DEFAULT, PLAIN) for model in MODELS)
    gains = [each for each in both if each is not None]
    if gains:  # a difference within noise is none
        found["codebook16_gain_over_plain"] = min(points if counts else max(points, 0.0) for points, counts in gains)
    return found


if __name__ == "__main__":
    main()
