"""The picture of a layer as text that other pages hold."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import fx

from fxprune.discovery.dependency import dependency_graph
from fxprune.dot.write import write_dot
from fxprune.errors import FxpruneError

__all__ = ["layer_svg"]


def layer_svg(graph_module: fx.GraphModule, norm: str = "sliced") -> str:
    """Return the layer in the middle of a graph as inline SVG; nothing where graphviz is not installed, or fails.

    Args:
        graph_module: a traced graph.
        norm: as for :func:`fxprune.dependency_graph`.
    """
    if shutil.which("dot") is None:
        return ""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "layer.svg"
        with suppress(FxpruneError):
            write_dot(dependency_graph(graph_module, norm), file)
        found = re.search(r"<svg.*</svg>", file.read_text(encoding="utf-8"), re.S) if file.exists() else None
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", found[0]) if found else ""  # a page knows SVG without them
