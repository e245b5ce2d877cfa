"""The modelling modules are copied into checkpoints: they import nothing else of ours, and fit in one file."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import fxprune.modelling

FOLDER = Path(fxprune.modelling.__file__).parent
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_module_imports_torch_transformers_and_its_like(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            for name in names:
                known = name.startswith("fxprune.modelling.") or name.partition(".")[0] in sys.stdlib_module_names
                assert known or name.partition(".")[0] in ("torch", "transformers"), name


def test_no_name_is_defined_twice() -> None:
    names: list[str] = []
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.append(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names += [target.id for target in targets if isinstance(target, ast.Name) and target.id != "__all__"]
    assert sorted(names) == sorted(set(names)) and len(names) > 20
