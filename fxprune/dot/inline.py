"""The picture of a layer as text that other pages hold."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import fx

from fxprune.discovery.dependency import dependency_graph
from fxprune.dot.write import write_dot

__all__ = ["layer_svg"]


def layer_svg(graph_module: fx.GraphModule, norm: str = "sliced") -> str:
    """Return the layer in the middle of a graph as inline SVG; nothing where graphviz is not installed, or fails.

    Args:
        graph_module: a traced graph.
        norm: as for :func:`fxprune.dependency_graph`.
    """
    program = shutil.which("dot")
    if program is None:
        return ""
    with TemporaryDirectory() as folder:
        text = Path(folder) / "layer.dot"
        write_dot(dependency_graph(graph_module, norm), text)
        done = subprocess.run([program, "-Tsvg", str(text)], capture_output=True, check=False)
    found = re.search(r"<svg.*</svg>", done.stdout.decode("utf-8", "replace"), re.S) if not done.returncode else None
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", found[0]) if found else ""  # a page knows SVG without them
