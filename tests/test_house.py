"""The rules of the house, checked on the source: imports run downhill, no architecture, no pickle, all documented."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx

from fxprune.pipeline.registry import pass_names
from fxprune.rules.registry import registered_rules

ROOT = Path(__file__).parents[1]
FILES = sorted((*(ROOT / "fxprune").rglob("*.py"), *(ROOT / "passes").rglob("*.py")))
PATHS = [str(path.relative_to(ROOT)) for path in FILES]

MAP = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROOMS = tuple(re.findall(r"^\| `(\w+)/?` \|", MAP, re.M))
"""The rooms of the framework from bottom to top, as the map for contributors has them."""

FACE = {"", "result", "recipes", "api", "sweep", "cli", "__main__"}
"""What the suite does not know."""

MOST_LOOSE_MODULES = 6

ARCHITECTURES = (
    "llama|mistral|mixtral|qwen|gemma|phi[0-9]|gpt|neox|bloom|falcon|codegen|starcoder|olmo|cohere|granite|smollm|mamba"
    "|nemotron|persimmon|exaone|deepseek|rwkv|jamba|bert\\b|\\bt5\\b|\\bopt\\b"
)
PROJECTIONS = "[a-z]+_proj\\b|c_attn|c_fc|qkv|query_key|lm_head|self_attn|embed_tokens|\\bfc[12]\\b|dense_4h|dense_h"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fxprune", *parts) if parts[0] == "passes" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES}


@cache
def tree_of(path: Path) -> ast.Module:
    """A module, parsed once."""
    return ast.parse(path.read_text())


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


@cache
def imports(path: Path) -> set[str]:
    """Dotted names of what a module imports while it is imported itself."""
    found: set[str] = set()
    for node in at_import(tree_of(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            whole = node.module or ""
            if node.level:
                assert node.level == 1 and path.is_relative_to(ROOT / "passes"), f"{path}: a relative import"
                whole = f"{name_of(path.parent)}.{whole}"
            found.update({f"{whole}.{alias.name}" for alias in node.names} & MODULES or {whole})
    return found


def part(module: str) -> str:
    """The room that a module belongs to; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 60
    assert "fxprune.axes" in imports(ROOT / "fxprune/discovery/groups.py")
    assert "networkx" not in imports(ROOT / "fxprune/graph/facts.py")
    assert "fxprune.removal.removal" in imports(ROOT / "passes/select/ratio.py")


def test_every_room_has_its_place() -> None:
    rooms = {part(name_of(path)) for path in FILES} - {"", "passes"}
    assert rooms == set(ROOMS), "say in CONTRIBUTING.md what it stands on"
    loose = [path.name for path in (ROOT / "fxprune").glob("*.py")]
    assert len(loose) <= MOST_LOOSE_MODULES, loose


def test_arrows_between_rooms_run_one_way() -> None:
    place = {room: i for i, room in enumerate(ROOMS)}
    uphill = [
        f"{here} -> {there}"
        for path in FILES
        if (here := name_of(path)).startswith("fxprune.") and part(here) != "passes"
        for there in imports(path)
        if there.startswith("fxprune.") and place[part(there)] > place[part(here)]
    ]
    assert uphill == []
    assert [name_of(p) for p in FILES if "fxprune" in imports(p) and part(name_of(p)) not in ("", "cli")] == []


def test_imports_go_in_no_circle() -> None:
    graph = nx.DiGraph((name_of(path), there) for path in FILES for there in imports(path))
    assert [c for c in nx.simple_cycles(graph) if any(name.startswith("fxprune") for name in c)] == []


def test_the_framework_never_imports_the_suite() -> None:
    text = {name_of(path): path.read_text() for path in FILES if part(name_of(path)) != "passes"}
    assert [name for name, code in text.items() if re.search(r"(from|import) (fxprune\.)?passes\b", code)] == []


def test_the_framework_names_passes_in_one_file_alone() -> None:
    """Names of passes stand in the file that builds the pipeline of a prune, and in docs."""
    names = set(pass_names()) - {"random", "shrink", "tune"}  # words of the language and names of stages, too
    for path in FILES:
        if part(name_of(path)) in ("passes", "cli", "api"):
            continue
        tree = tree_of(path)
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        named = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docs
            and node.value.partition("{")[0] in names
        ]
        assert named == [], path


def test_the_suite_never_imports_the_face() -> None:
    found = [
        f"{name_of(path)} -> {there}"
        for path in FILES
        if part(name_of(path)) == "passes"
        for there in imports(path)
        if there.split(".")[0] == "fxprune" and part(there) in FACE
    ]
    assert found == []


def test_one_name_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name_of(path) for path in FILES if path.name == "__init__.py"}
    assert sorted(settings["packages"]) == sorted(folders)
    assert all(name.split(".")[0] == "fxprune" for name in settings["packages"])
    code = "from importlib.util import find_spec; print(find_spec('passes'), find_spec('fxprune.passes.shrink').name)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "None fxprune.passes.shrink"


def test_the_map_for_contributors_names_the_stages() -> None:
    stages = sorted(path.parent.name for path in (ROOT / "passes").glob("*/__init__.py"))
    assert stages and all(f"`{stage}`" in MAP for stage in stages)


def test_what_ops_do_is_told_in_the_rules_alone() -> None:
    """No table of ops or of their names stands at the top of a module elsewhere."""
    known = {name.removeprefix("aten::") for name in registered_rules()}
    for path in FILES:
        if part(name_of(path)) == "rules":
            continue
        for node in tree_of(path).body:
            inner = list(ast.walk(node.value)) if isinstance(node, ast.Assign | ast.AnnAssign) and node.value else []
            ops = {ast.unparse(n) for n in inner if isinstance(n, ast.Attribute)}
            words = [n.value for n in inner if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            assert sum(op.startswith(("aten.", "torch.ops.aten.")) for op in ops) < 2, f"{path}:{node.lineno}"
            assert sum(word in known for text in words for word in text.split()) < 4, f"{path}:{node.lineno}"


def test_no_architecture_is_known() -> None:
    texts = {path: re.sub("LLM-Pruner", "", file.read_text()) for path, file in zip(PATHS, FILES, strict=True)}
    named = f"{ARCHITECTURES}|{PROJECTIONS}"
    assert {path: found for path, text in texts.items() if (found := re.findall(named, text, re.IGNORECASE))} == {}


def test_nothing_is_pickled() -> None:
    pickled = re.compile(r"\b(?:c?pickle|dill|shelve|joblib)\b|torch\.(?:save|load)\(")
    assert [path for path, file in zip(PATHS, FILES, strict=True) if pickled.search(file.read_text())] == []


def test_modules_and_their_public_names_are_documented() -> None:
    """Each module, class and function that is public by its name has a docstring; a rule has its notation instead."""
    wrong = []
    for path, file in zip(PATHS, FILES, strict=True):
        tree = tree_of(file)
        wrong += [] if ast.get_docstring(tree) else [f"{path}: no docstring"]
        wrong += [
            f"{path}: {node.name} has no docstring"
            for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
            and not any(ast.unparse(mark).startswith(("rule(", "respell(")) for mark in node.decorator_list)
        ]
    assert wrong == []


def test_a_name_has_one_meaning() -> None:
    """No two classes at the top of modules share a name."""
    places: dict[str, list[str]] = {}
    for path, file in zip(PATHS, FILES, strict=True):
        for node in tree_of(file).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_a_broad_except_has_its_reason_beside_it() -> None:
    broad = re.compile(r"^\s*except( Base)?\(?\s*(Base)?Exception\b[^#\n]*(#.*)?$|^\s*except:.*$", re.M)
    bare = [
        f"{path.relative_to(ROOT)}: {match[0].strip()}"
        for path in FILES
        for match in broad.finditer(path.read_text())
        if "#" not in match[0]
    ]
    assert bare == []


def test_private_names_of_torch_are_imported_in_one_place() -> None:
    private = re.compile(r"^\s*(from|import) torch\S*\._|^\s*from torch\S* import .*\b_\w|fx\.experimental", re.M)
    assert [path for path, file in zip(PATHS, FILES, strict=True) if private.search(file.read_text())] == [
        "fxprune/graph/compat.py"
    ]


def test_files_beside_the_code_are_packaged() -> None:
    """A text, a page or a table that no pattern names is there in a clone, and missing once it is installed."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    kept = subprocess.check_output(["git", "ls-files", "fxprune", "passes"], cwd=ROOT, text=True)
    beside = [Path(line) for line in kept.splitlines() if not line.endswith(".py")]
    missed = [
        str(path)
        for path in beside
        if not any(path.match(pattern) for pattern in told.get(".".join(path.parent.parts), ()))
    ]
    assert len(beside) > 5 and not missed


def test_each_promise_names_tests_that_there_are() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", MAP)
    assert len(named) > 15
    assert [name for path, name in named if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")] == []
