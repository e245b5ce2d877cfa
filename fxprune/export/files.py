"""What every kind of export shares: packages that it needs, errors in one line, files that are whole or not there."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxprune.errors import ExportError

__all__ = ["ROUGH", "as_export_error", "replacing", "require_packages"]

ROUGH = 2e-2
"""Accepted difference where weights are narrower than float32: two runtimes round at different places.

One rounding to bfloat16 is off by up to ``2**-8``; this leaves room for five that add up.
"""


def require_packages(*names: str) -> None:
    """Refuse to go on without packages that ONNX needs.

    Raises:
        ExportError: one is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}", where="packages", remedy="pip install 'fxprune[onnx]'")


@contextmanager
def as_export_error(path: Path | None = None) -> Iterator[None]:
    """Turn what torch or onnxruntime raise into an error of one line."""
    try:
        yield
    except Exception as error:  # torch and onnxruntime raise errors of many kinds, some of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = path.name if path is not None else "graph_module"
        raise ExportError(f"cannot be exported: {reason}", where=where, remedy="The cause has the details") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to beside ``path``; move what is there into place at the end, unless something raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder) / path.name
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            file.replace(path.parent / file.name)
