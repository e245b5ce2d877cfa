"""Helpers of all exports: required packages, errors in one line, files that are written whole or not at all."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxprune.errors import ExportError

__all__ = ["LOW_PRECISION_TOLERANCE", "atomic_path", "require_packages", "wrap_export_errors"]

LOW_PRECISION_TOLERANCE = 2e-2
"""Accepted difference of logits with weights narrower than float32: two runtimes round at different places.

One rounding to bfloat16 is off by up to ``2**-8``; this leaves room for five that add up.
"""


def require_packages(*names: str) -> None:
    """Raise ExportError if packages that ONNX needs are missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}", where="packages", remedy="pip install 'fxprune[onnx]'")


@contextmanager
def wrap_export_errors(path: Path | None = None) -> Iterator[None]:
    """Turn exceptions of torch and onnxruntime into an ExportError of one line."""
    try:
        yield
    except Exception as error:  # torch and onnxruntime raise many types, some of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = path.name if path is not None else "graph_module"
        raise ExportError(f"cannot be exported: {reason}", where=where, remedy="The cause has the details") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; move the files written there into the place of ``path`` unless an error occurs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder) / path.name
        # the file itself goes last: what it refers to is then in place
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            file.replace(path.parent / file.name)
