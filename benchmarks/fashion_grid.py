"""What the Fashion-MNIST benchmark runs, in which order, and the recipe that is the same for everyone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from fashion_tasks import CONTROL, DENSE, Base, Budget, Method, Run, Task

__all__ = [
    "CRITERIA",
    "DEFAULT",
    "FULL",
    "LAMP_MIXED",
    "MAGNITUDE_UNIFORM",
    "MEASURED",
    "MODELS",
    "QUICK",
    "Recipe",
    "bases_of",
    "fingerprint",
    "fit_settings_of",
    "queue",
    "quick_runs",
    "runs",
    "selected",
    "settings_of",
]

MODELS = ("cnn", "resnet", "lenet")
CRITERIA = ("default", "magnitude", "lamp", "wanda", "fisher", "taylor", "random")


@dataclass(frozen=True)
class Recipe:
    """The same for every run; accuracies of different recipes are never compared.

    Args:
        dense_epochs: Of the fit that everything starts from.
        epochs: Of compression, and of the control, which is the dense model trained on without it.
        pruning_end: Share of compression's epochs after which weights are quantized.
        train_samples, val_samples, test_samples: The first so many images of each part.
        weight_decay: Of compression and control; the dense fit has the module's own.
        distillation: Weight of the dense model as a teacher, in (0, 1]; None: none teaches.
        scoring_samples, pruning_steps: Of a scoring pass, of the ramp; None for the package's defaults.
    """

    dense_epochs: int = 10
    epochs: int = 6
    batch_size: int = 128
    learning_rate: float = 0.1
    precision: str = "bf16-mixed"
    pruning_end: float = 4 / 6
    train_samples: int = 55_000
    val_samples: int = 5_000
    test_samples: int = 10_000
    weight_decay: float = 0.0
    distillation: float | None = 0.7
    scoring_samples: int | None = None
    pruning_steps: int | None = None


FULL = Recipe()
QUICK = Recipe(1, 1, train_samples=1_024, val_samples=500, test_samples=500, scoring_samples=64, pruning_steps=3)


MEASURED = "accuracy"  # a torchmetrics metric, measured before the first batch, too
DEFAULT = Method("default")
MAGNITUDE_UNIFORM = Method("magnitude", "uniform")
LAMP_MIXED = Method("lamp")
FISHER_MIXED = Method("fisher")


def runs() -> list[Run]:
    """All of them, in the order in which they are worth having."""
    every = (Method(name, widths) for widths in ("mixed", "uniform") for name in CRITERIA)
    sizes = [
        ("cnn", (DEFAULT, MAGNITUDE_UNIFORM, LAMP_MIXED, FISHER_MIXED), (97.5, 98.5, 99.0), 3),
        ("resnet", (DEFAULT, MAGNITUDE_UNIFORM, LAMP_MIXED), (97.5, 98.5), 2),
        ("lenet", tuple(every), (92.0, 95.0, 97.5, 98.5, 99.0), 3),
    ]
    found: list[Run] = []
    for seed in range(3):
        for model, methods, reductions, seeds in sizes:
            if seed < seeds:
                found += [Run(model, each, Budget("size", size), seed) for size in reductions for each in methods]
        for model in ("cnn", "lenet"):
            found += [Run(model, Method("nonpositive"), Budget("sparsity", each), seed) for each in (0.5, 0.9, 0.95)]
            found.append(Run(model, Method("literal"), Budget("natural"), seed))
        found.append(Run("cnn", DEFAULT, Budget("max_drop", 0.5), seed))
    return found


def quick_runs() -> list[Run]:
    """One or two of each kind."""
    return [
        Run("cnn", DEFAULT, Budget("size", 97.5), 0),
        Run("cnn", MAGNITUDE_UNIFORM, Budget("size", 97.5), 0),
        Run("resnet", DEFAULT, Budget("size", 97.5), 0),
        Run("lenet", DEFAULT, Budget("size", 95.0), 0),
        Run("lenet", Method("wanda", "uniform"), Budget("size", 95.0), 0),
        Run("lenet", Method("nonpositive"), Budget("sparsity", 0.5), 0),
        Run("lenet", Method("literal"), Budget("natural"), 0),
        Run("lenet", DEFAULT, Budget("max_drop", 0.5), 0),
    ]


def selected(among: Iterable[Run], pattern: str = "*", seeds: Iterable[int] | None = None) -> list[Run]:
    """Those whose key matches a shell pattern (`*` matches slashes, too), of these seeds.

    Raises:
        ValueError: There are none.
    """
    chosen = None if seeds is None else set(seeds)
    among = list(among)
    found = [each for each in among if fnmatchcase(each.key, pattern) and (chosen is None or each.seed in chosen)]
    if not found:
        raise ValueError(
            f"no run matches {pattern!r} with seeds {sorted(chosen) if chosen is not None else 'of all kinds'}: "
            f"expected keys such as {', '.join(each.key for each in among[:3])}"
        )
    return found


def bases_of(run: Run) -> list[Base]:
    """What has to be there first."""
    return [Base(run.model, run.seed, DENSE), Base(run.model, run.seed, CONTROL)]


def queue(chosen: Iterable[Run]) -> list[Task]:
    """Runs in their order, each base before the first that needs it."""
    tasks: dict[Task, None] = {}
    for run in chosen:
        tasks |= dict.fromkeys([*bases_of(run), run])
    return [*tasks]


def settings_of(run: Run) -> dict[str, Any]:
    """Settings of `XAICompression` that make the method and its budget, as plain types."""
    name, budget = run.method.name, run.budget
    settings: dict[str, Any] = {"selection": "least"}
    if name in ("nonpositive", "literal"):
        settings |= {"selection": name, "average_bits": 4.0}
    elif name != "default":
        settings["criterion"] = name
    if run.method.widths == "uniform":
        settings["bits"] = [4]
    if budget.kind == "size":
        settings["target_size"] = round(1 - budget.value / 100, 6)
    elif budget.kind == "sparsity":
        settings["sparsity"] = budget.value
    elif budget.kind == "max_drop":
        settings |= {"max_drop": budget.value, "metric": MEASURED}
    return settings


def fit_settings_of(run: Run, recipe: Recipe) -> dict[str, Any]:
    """Peak learning rate, and how often to validate.

    `max_drop` judges every validated state by the dense model, which a high learning rate makes worse by itself until
    it falls; and its steps are as long as validations are apart.
    """
    if run.budget.kind == "max_drop":
        return {"learning_rate": 0.3 * recipe.learning_rate, "val_check_interval": 0.25}
    return {"learning_rate": recipe.learning_rate, "val_check_interval": 1.0}


def fingerprint(recipe: Recipe, task: Task) -> str:
    """Changes with everything that the script decides about a task; results of another one are not used."""
    values = asdict(recipe)
    if isinstance(task, Base):
        later = {"pruning_end", "distillation", "scoring_samples", "pruning_steps"}
        if task.kind == DENSE:
            later |= {"epochs", "weight_decay"}
        values = {name: value for name, value in values.items() if name not in later}
    else:
        values |= {"settings": settings_of(task), **fit_settings_of(task, recipe)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
