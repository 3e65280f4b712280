"""Imports point one way: cli -> bench, zoo -> train, metrics, picture -> methods, guidance, lm, models -> core."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import whenwhere

ROOT = Path(whenwhere.__file__).parent
HEIGHT = {"cli": 4, "bench": 3, "zoo": 3, "train": 2, "metrics": 2, "picture": 2}
HEIGHT |= {"methods": 1, "guidance": 1, "lm": 1, "models": 1}
# At the top of the package, but no part of the core: the public names, and what reads the names of methods.
NOT_CORE = {"__init__", "__main__", "expression"}
STANDARD = {"torch", *sys.stdlib_module_names}
BRINGS_DIFFUSERS = {"lm", "models", "train", "zoo"}

FILES = sorted(path for path in ROOT.rglob("*.py"))
CORE = [path for path in FILES if path.relative_to(ROOT).parts[0] not in HEIGHT and path.stem not in NOT_CORE]


def imported(path: Path, deep: bool) -> Iterator[str]:
    """Dotted names of the modules that a file imports; within functions only if `deep`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    package = ("whenwhere", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree):
        if not deep and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names if module == "whenwhere")


def part(module: str) -> str:
    """The part of the package that a module of ours belongs to: a folder, or a file at the top."""
    return [*module.split("."), ""][1]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_down(path):
    own = path.relative_to(ROOT).parts[0]
    height = HEIGHT.get(own, 5 if path.stem in NOT_CORE else 0)
    for module in imported(path, deep=True):
        if module.startswith("whenwhere.") and part(module) != own:
            assert part(module) not in NOT_CORE or height >= 3, module
            assert HEIGHT.get(part(module), 0) <= height, module


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_imports_torch_the_standard_library_and_itself(path):
    for module in imported(path, deep=False):
        top = module.split(".")[0]
        assert top in STANDARD or (top == "whenwhere" and part(module) not in HEIGHT), module


@pytest.mark.parametrize("path", FILES, ids=name)
def test_heavy_libraries_are_imported_inside_functions(path):
    if path.relative_to(ROOT).parts[0] not in BRINGS_DIFFUSERS:
        heavy = {"diffusers", "transformers", "accelerate", "torchmetrics"}
        assert heavy.isdisjoint(module.split(".")[0] for module in imported(path, deep=False))


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "methods" and p.stem != "__init__"], ids=name)
def test_no_method_imports_another(path):
    assert not [module for module in imported(path, deep=True) if part(module) == "methods"]
