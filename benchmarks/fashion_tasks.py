"""The nouns of the Fashion-MNIST benchmark: what is done, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

__all__ = ["CONTROL", "DENSE", "Base", "BaseResult", "Budget", "Method", "Run", "RunResult", "Task"]

DENSE: Final = "dense"
CONTROL: Final = "control"


@dataclass(frozen=True)
class Method:
    """What decides.

    Args:
        name: A criterion, with `selection="least"`; "default" is the package's own. Or one of the selections
            "nonpositive" and "literal", with the package's criterion and 4 bits on average.
        widths: "mixed" bits of an output channel, or "uniform" 4 bits.
    """

    name: str
    widths: Literal["mixed", "uniform"] = "mixed"

    @property
    def label(self) -> str:
        """As tables show it."""
        return f"{self.name}, {'mixed bits' if self.widths == 'mixed' else 'uniform 4 bits'}"


@dataclass(frozen=True)
class Budget:
    """What is asked for.

    Args:
        kind: "size" (reduction of the file in percent), "sparsity" (a share), "max_drop" (points), or "natural": as far
            as the selection goes by itself.
        value: Of it.
    """

    kind: Literal["size", "sparsity", "max_drop", "natural"]
    value: float = 0.0

    @property
    def label(self) -> str:
        """As keys and tables show it."""
        if self.kind == "natural":
            return "natural end"
        if self.kind == "max_drop":
            return f"max_drop {self.value:g}"
        return f"{self.value:g} %" if self.kind == "size" else f"sparsity {self.value:g}"


@dataclass(frozen=True)
class Base:
    """A fit without compression: the dense model, or its control."""

    model: str
    seed: int
    kind: Literal["dense", "control"]

    @property
    def key(self) -> str:
        """Its name in results and on disk."""
        return f"{self.model}/{self.kind}/seed{self.seed}"


@dataclass(frozen=True)
class Run:
    """One compression of one dense model."""

    model: str
    method: Method
    budget: Budget
    seed: int

    @property
    def key(self) -> str:
        """Its name in results and on disk, such as "cnn/lamp-mixed/98.5/seed0"."""
        budget = self.budget.label.removesuffix(" %").replace(" ", "-")
        return f"{self.model}/{self.method.name}-{self.method.widths}/{budget}/seed{self.seed}"

    @property
    def case(self) -> Run:
        """The same for all seeds."""
        return replace(self, seed=-1)

    def to_dict(self) -> dict[str, Any]:
        """Flat, of plain types."""
        method, budget = self.method, self.budget
        plain = {"method": method.name, "widths": method.widths, "budget": budget.kind, "value": budget.value}
        return {"model": self.model, **plain, "seed": self.seed}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Run:
        """What `to_dict` gave; other entries are not looked at."""
        method, budget = Method(values["method"], values["widths"]), Budget(values["budget"], values["value"])
        return cls(values["model"], method, budget, values["seed"])


Task = Base | Run


@dataclass(frozen=True)
class BaseResult:
    """Of a dense model or a control.

    Args:
        val, test: Accuracy in percent.
        seconds: Of the fit.
        recipe: What it was made by, see `fingerprint`.
        start: Digest of the weights it started from; "" for a dense one.
        weights: Digest of the weights it ended with.
    """

    val: float
    test: float
    seconds: float
    recipe: str
    start: str
    weights: str


@dataclass(frozen=True)
class RunResult:
    """Of a compression.

    Args:
        val, test: Accuracy in percent of the file, read back.
        bytes, dense_bytes: Size of the compressed file, and of the dense model's in fp32.
        target: Bytes asked for; None where the budget is no size.
        sparsity, average_bits: Of all compressible weights.
        seconds: Of the fit, the export included.
        history: Entries of the report's history.
        recipe, start: As of `BaseResult`.
    """

    val: float
    test: float
    bytes: int
    dense_bytes: int
    target: int | None
    sparsity: float
    average_bits: float | None
    seconds: float
    history: int
    recipe: str
    start: str

    @property
    def reduction(self) -> float:
        """Share of the dense bytes that is saved."""
        return 1 - self.bytes / self.dense_bytes
