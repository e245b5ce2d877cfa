"""The rules of the house, checked on the source: imports run downhill, no architecture, no pickle, all documented."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((*(ROOT / "fxprune").rglob("*.py"), *(ROOT / "passes").rglob("*.py")))
PATHS = [str(path.relative_to(ROOT)) for path in FILES]

FLOORS = (
    {"errors"},
    {"axes", "compat", "layerwise", "literals", "quiet", "selecting", "tensors", "text"},
    {"state", "depth"},
    {"trace", "fork"},
    {"rules"},
    {"experts", "vanishing"},
    {"dependency"},
    {"groups"},
    {"plan", "scores", "masking", "macs", "calibration"},
    {"lockstep", "probe", "verify", "passbase", "report"},
    {"registry"},
    {"pipeline"},
    {"emit", "dot", "checkpoint", "export"},
    {"shrinking", "stock"},
    {"evaluation", "recovery"},
    {"comparison"},
    {"api"},
    {"cli"},
)
"""What stands on what, from below. A module imports from lower floors, or from its own without a circle."""

FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

ARCHITECTURES = (
    "llama|mistral|mixtral|qwen|gemma|phi[0-9]|gpt|neox|bloom|falcon|codegen|starcoder|olmo|cohere|granite|smollm|mamba"
    "|nemotron|persimmon|exaone|deepseek|rwkv|jamba|bert\\b|\\bt5\\b|\\bopt\\b"
)
PROJECTIONS = "[a-z]+_proj\\b|c_attn|c_fc|qkv|query_key|lm_head|self_attn|embed_tokens|\\bfc[12]\\b|dense_4h|dense_h"


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES}


def at_import(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported; what is there for type checkers alone is not among them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from at_import(node)


def imports(path: Path) -> set[str]:
    """Dotted names of what a module imports while it is imported itself."""
    found: set[str] = set()
    for node in at_import(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(below & MODULES or {node.module or ""})
    return found


def part(module: str) -> str:
    """The part of the framework that a module belongs to; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 60
    assert "fxprune.axes" in imports(ROOT / "fxprune/groups.py")
    assert "networkx" not in imports(ROOT / "fxprune/state.py")


def test_every_part_has_its_floor() -> None:
    parts = {part(name_of(path)) for path in FILES if name_of(path).startswith("fxprune.")}
    assert parts - set(FLOOR) == set(), "say in FLOORS what it stands on"


def test_imports_run_downhill() -> None:
    uphill = []
    for path in FILES:
        here = name_of(path)
        if here.startswith("fxprune."):
            for there in imports(path):
                known = there.split(".")[0] == "fxprune" and part(there) != part(here)
                if known and FLOOR.get(part(there), len(FLOORS)) > FLOOR[part(here)] and part(here) != "cli":
                    uphill.append(f"{here} -> {there}")
    assert uphill == []


def test_imports_go_in_no_circle() -> None:
    graph = nx.DiGraph((name_of(path), there) for path in FILES for there in imports(path))
    assert [c for c in nx.simple_cycles(graph) if any(name.startswith(("fxprune", "passes")) for name in c)] == []


def test_the_framework_never_imports_the_suite() -> None:
    guilty = [name_of(path) for path in FILES for there in imports(path) if there.split(".")[0] == "passes"]
    assert {module.split(".")[0] for module in guilty} == {"passes"}


def test_the_suite_never_imports_the_face() -> None:
    face = {"", "api", "cli", "shrinking", "report", "emit"}
    found = [
        f"{name_of(path)} -> {there}"
        for path in FILES
        if name_of(path).startswith("passes")
        for there in imports(path)
        if there.split(".")[0] == "fxprune" and part(there) in face
    ]
    assert found == []


def test_private_names_of_torch_are_imported_in_one_place() -> None:
    private = re.compile(r"^\s*(from|import) torch\S*\._|^\s*from torch\S* import .*\b_\w|fx\.experimental", re.M)
    assert [path for path, file in zip(PATHS, FILES, strict=True) if private.search(file.read_text())] == [
        "fxprune/compat.py"
    ]


@pytest.mark.parametrize("path", FILES, ids=PATHS)
def test_no_architecture_is_known(path: Path) -> None:
    for names in (ARCHITECTURES, PROJECTIONS):
        text = re.sub("LLM-Pruner", "", path.read_text())
        assert re.findall(names, text, re.IGNORECASE) == []


@pytest.mark.parametrize("path", FILES, ids=PATHS)
def test_nothing_is_pickled(path: Path) -> None:
    assert re.findall(r"\b(?:c?pickle|dill|shelve|joblib)\b|torch\.(?:save|load)\(", path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=PATHS)
def test_modules_say_what_they_are_and_what_they_offer(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    offered = [node.value for node in tree.body if isinstance(node, ast.Assign) and _is_all(node.targets[0])]
    if path == ROOT / "passes/__init__.py":
        return  # a name for its folders alone
    assert len(offered) == 1, "no __all__"
    names = ast.literal_eval(offered[0])
    assert names == sorted(set(names), key=_isort_key)
    assert set(names) <= {name for node in tree.body for name in _defined(node)}
    public = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    undocumented = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in names and not ast.get_docstring(node)
    ]
    assert undocumented == []
    assert names or not {name for name in public if not name.startswith("_")}


def _is_all(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and target.id == "__all__"


def _isort_key(name: str) -> tuple[int, str]:
    """Constants, classes, functions: the order ruff keeps."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


@pytest.mark.parametrize("path", FILES, ids=PATHS)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 310
