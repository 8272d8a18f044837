"""The house rules that a parser can check: imports run downward, small functions and files, no pickle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("compress", "deploy") for path in (ROOT / package).rglob("*.py"))
MAY_DEPLOY = {"cli", "pipeline", "comparison", "doctor", "console", "inspection", "preview"}
MAY_DEPLOY |= {
    "aim",
    "further",
    "measuring",
    "opening",
    "profiling",
    "variants",
    "release",
    "show",
    "show_inspect",
    "cli_inspect",
    "earlier",
    "ci",
    "meter",
    "front",
    "budgeting",
    "latency",
    "handover",
}
CORE = ("trace", "labels", "rules", "layer_rules", "channelmap", "cost", "select", "plan", "surgery")
CORE += ("importance", "graphfile")
TRAINING = {"train", "loop", "task", "data", "objective", "checkpoint", "models", "config", "schema", "seeds"}
TRAINING |= {"pipeline", "steps", "cli", "importance", "api"}
LONGEST_FUNCTION = 80
LONGEST_FILE = 500
NO_PICKLE = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

every_file = pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, at any depth; `from a import b` counts as a.b."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_modules(path: Path, package: str) -> set[str]:
    """First-level modules of `package` that a file imports ("" for the package itself)."""
    parts = [name.split(".") for name in imports(path)]
    return {name[1] if len(name) > 1 else "" for name in parts if name[0] == package}


@every_file
def test_deploy_knows_nothing_of_compress(path: Path) -> None:
    if path.is_relative_to(ROOT / "deploy"):
        assert not imported_modules(path, "compress")


@every_file
def test_few_modules_know_both_packages(path: Path) -> None:
    if path.parent == ROOT / "compress" and imported_modules(path, "deploy") - {"errors", "files"}:
        assert path.stem in MAY_DEPLOY


@pytest.mark.parametrize("name", CORE)
def test_the_core_knows_nothing_of_training(name: str) -> None:
    found = imported_modules(ROOT / "compress" / f"{name}.py", "compress") & TRAINING
    assert found <= {"importance"} if name == "importance" else not found


def test_imports_run_downward() -> None:
    """No module of compress imports one that (in)directly imports it, not even inside a function."""
    names = {path.stem for path in FILES if path.parent == ROOT / "compress"} - {"__init__"}
    needs = {n: imported_modules(ROOT / "compress" / f"{n}.py", "compress") & names - {n} for n in names}
    while ready := {name for name, wanted in needs.items() if not wanted & needs.keys()}:
        for name in ready:
            del needs[name]
    assert not needs, f"a circle among {sorted(needs)}"


@every_file
def test_no_pickle(path: Path) -> None:
    """Nothing of it is used but the name of the exception that torch raises."""
    found = {name.split(".")[0] for name in imports(path)} & NO_PICKLE
    uses = [ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)]
    assert found <= {"pickle"}
    assert {use for use in uses if use.startswith("pickle.")} <= {"pickle.UnpicklingError"}


@every_file
def test_torch_loads_weights_only(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.jit.load"):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert ast.unparse(node.func) == "torch.load"
            assert given.get("weights_only") == "True", f"line {node.lineno}"


@every_file
def test_no_function_is_long(path: Path) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    long = [f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > LONGEST_FUNCTION]
    assert not long


@every_file
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@every_file
def test_nothing_is_left_to_do(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not any(word in text for word in ("TODO", "FIXME", "XXX", "raise NotImplementedError"))


def test_the_parser_sees_imports() -> None:
    """The helpers above, on files known to hold what they look for."""
    assert "surgery" in imported_modules(ROOT / "compress" / "api.py", "compress")
    assert "compress.trace.get_tensor" in set(imports(ROOT / "compress" / "surgery.py"))
    assert len(FILES) > 30
