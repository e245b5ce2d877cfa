"""Wheel and source archive, each built and installed in an environment of its own; `make package` asks for it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("FXPRUNE_PACKAGE" not in os.environ, reason="builds packages; run by `make package`"),
]

TRY = """
import importlib.resources, sys
import torch, fxprune
from fxprune.data.built_in import general_text
from torch import nn

assert fxprune.__file__.startswith(sys.prefix), fxprune.__file__
assert (importlib.resources.files("fxprune") / "py.typed").is_file()
net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
result = fxprune.prune(net, importance="l2", ratio=0.2, example_inputs={"input": torch.randn(2, 6)}, protect=())
assert result.report.achieved > 0 and result.report.verification_error < 1e-5
assert "<svg" in result.to_html()
assert len(general_text()) > 100_000
assert fxprune.prune_pipeline(importance="l2", recipe="llm-pruner") and "tune" in fxprune.pass_names()
print("pruned")
"""


def call(*command: object, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is under version control, so that nothing else can be in a package."""
    copy = tmp_path_factory.mktemp("source")
    for name in call("git", "ls-files", cwd=ROOT).splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An environment that has what this package needs, and not this package."""
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    # Python 3.11 puts a setuptools into it that is too old, and would be found before the one in `needed.pth`
    call(tmp_path / "venv/bin/python", "-m", "pip", "uninstall", "--yes", "setuptools")
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    (packages / "needed.pth").write_text(f"{Path(spec.origin).parents[1]}\n")
    return tmp_path / "venv/bin/python"


def build(source: Path, kind: str, out: Path) -> Path:
    """A package of a kind, made by the build backend itself."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    out.mkdir()
    call(sys.executable, "-c", code, cwd=source)
    (made,) = out.iterdir()
    return made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_package_is_installed_and_prunes(kind: str, source: Path, python: Path, tmp_path: Path) -> None:
    made = build(source, kind, tmp_path / "dist")
    call(python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", made)
    assert call(python, "-I", "-c", TRY, cwd=tmp_path).strip().endswith("pruned")
    assert call(python.with_name("fxprune"), "--version", cwd=tmp_path).startswith("fxprune ")
    assert "balanced" in call(python.with_name("fxprune"), "recipes", cwd=tmp_path)
