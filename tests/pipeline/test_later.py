"""Names of packages that come when they are asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fxprune.export
import fxprune.recovery
from fxprune.export.model import export_model
from fxprune.pipeline.later import later


def test_a_name_comes_from_its_module_and_another_is_none() -> None:
    assert fxprune.export.export_model is export_model
    assert all(getattr(fxprune.recovery, name).__name__ == name for name in fxprune.recovery.__all__)
    with pytest.raises(AttributeError, match=r"module 'fxprune.export' has no attribute 'exprot'"):
        later("fxprune.export", {"export_model": "model"})("exprot")


@pytest.mark.parametrize("module", ["fxprune.export.gguf.types", "fxprune.recovery.settings", "fxprune.data.rows"])
def test_modules_without_torch_start_without_it(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
