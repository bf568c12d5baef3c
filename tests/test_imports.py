"""Imports run one way, and the deploying machine needs little."""

import ast
from pathlib import Path

import pytest

import lightning_xai_compress

PACKAGE = Path(lightning_xai_compress.__file__).parent

# what each room may import of this package; in the order of the pipeline
ALLOWED = {
    "errors": set(),
    "checks": set(),
    "tables": set(),
    "plan": set(),
    "ranking": set(),
    "layers": {"errors", "plan"},
    "sizes": set(),
    "relevance": {"errors", "plan", "layers"},
    "criteria": {"errors", "plan", "ranking", "layers", "relevance"},
    "pruning": {"errors", "plan", "ranking"},
    "quantization": {"errors", "plan"},
    "structure": {"errors", "plan", "sizes"},
    "formats": {"errors", "plan", "layers", "sizes"},
    "report": {"errors", "plan", "layers", "relevance", "formats", "tables"},
    "budget": {"errors", "plan", "structure", "formats", "quantization", "report"},
    "compression": {
        *("errors", "plan", "layers", "relevance", "criteria", "pruning", "quantization", "formats", "report"),
        "budget",
    },
    "callbacks": {
        *("errors", "plan", "layers", "relevance", "criteria", "pruning", "quantization", "formats", "report"),
        *("structure", "budget", "tables"),
    },
    "commands": {"errors", "formats", "callbacks", "tables"},
    "__main__": {"commands"},
}
# libraries that only one place may import
OWNERS = {
    "lightning": "callbacks",
    # the second one only where load_compressed(integers=True) asks for it: formats must not import quantization
    "torchao": ("quantization/grid.py", "formats/load_torchao.py"),
    "torch_pruning": "structure/dependencies.py",
    "torchmetrics": ("report", "compression", "callbacks"),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def files():
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_comes_before_it(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        if name.startswith("lightning_xai_compress."):
            other = name.split(".")[1]
            assert other == room or other in ALLOWED[room] | {"errors", "checks"}, f"{room} must not import {other}"
        library = name.split(".")[0]
        if library in OWNERS:
            relative = str(path.relative_to(PACKAGE))
            assert relative.startswith(OWNERS[library]), f"{relative} must not import {library}"


def test_every_public_name_resolves():
    for name in lightning_xai_compress.__all__:
        assert getattr(lightning_xai_compress, name).__name__ == name


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'XAIPruning'"):
        lightning_xai_compress.XAIPruning  # noqa: B018
