"""Every model type of transformers: what is found in it, what goes exactly, what stays and why.

`python -m tests.coverage_table` examines all types of causal language models, each in a process of its own, and writes
`benchmarks/results/coverage.json` and from it `docs/coverage.md`; with names of types it does these anew, and
`--page` writes the page alone. `--classes` examines the types of other Auto classes, all of them or those named, and
writes `benchmarks/results/coverage_classes.json`; a type of another class is named with it, as in
`AutoModelForMaskedLM/bert`.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common import environment
from tests.coverage_page import page
from tests.coverage_types import Coverage, examine
from tests.zoo import types
from tests.zoo_classes import auto_classes

ROOT = Path(__file__).parents[1]
DATA = ROOT / "benchmarks" / "results" / "coverage.json"
OTHER = DATA.with_name("coverage_classes.json")
PAGE = ROOT / "docs" / "coverage.md"
SECONDS = 120
"""Of processor time for one type; five times as much on the clock."""

Row = dict[str, Any]


def rows_of(names: Sequence[str], workers: int, seconds: int, look: Callable[..., Coverage] = examine) -> Iterator[Row]:
    """What was found about each type, as it comes in; a crash or a hang costs that type alone."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(names))
    running: dict[str, tuple[BaseProcess, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop()
                process = context.Process(target=_look, args=(name, _path(folder, name), seconds, look))
                process.start()
                running[name] = process, time.monotonic()
            time.sleep(0.05)
            for name, (process, start) in list(running.items()):
                late = time.monotonic() - start > 5 * seconds
                if process.is_alive() and not late:
                    continue
                process.kill()
                process.join()
                del running[name]
                yield _row(name, _path(folder, name), process.exitcode, seconds)


def _path(folder: str, name: str) -> Path:
    return Path(folder) / f"{name.replace('/', '.')}.json"


def _look(name: str, path: Path, seconds: int, look: Callable[..., Coverage]) -> None:
    """In a process of its own: examine one type and leave what was found in ``path``, as far as it came."""
    start = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(start) + seconds, int(start) + seconds + 5))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def keep(found: Coverage) -> None:
        row = dataclasses.asdict(found) | {"seconds": round(time.process_time() - start, 1)}
        path.with_suffix(".part").write_text(json.dumps(row))
        path.with_suffix(".part").replace(path)

    keep(Coverage(name))
    keep(look(name, keep))


def _row(name: str, path: Path, exitcode: int | None, seconds: int) -> Row:
    row: Row = json.loads(path.read_text()) if path.exists() else dataclasses.asdict(Coverage(name))
    if exitcode != 0 and not row["error"]:
        ended = exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        row["error"] = f"not done after {seconds} s" if ended else f"the process ended with {exitcode}"
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Examine types, and write the data and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("types", nargs="*", help="model types; all of them if none is named")
    parser.add_argument("--workers", type=int, default=2, help="types at a time")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="processor time for one type")
    parser.add_argument("--rest", action="store_true", help="leave types alone that the data has already")
    parser.add_argument("--page", action="store_true", help="only write the page from the data")
    parser.add_argument("--classes", nargs="*", help="Auto classes other than that for causal language models")
    chosen = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    others = [f"{name}/{t}" for name, named in auto_classes().items() for t in named]
    is_other = chosen.classes is not None or any("/" in name for name in chosen.types)
    every, path = (others, OTHER) if is_other else (list(types()), DATA)
    wanted = chosen.types or [name for name in every if not chosen.classes or name.partition("/")[0] in chosen.classes]
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows: dict[str, Row] = {row["type"]: row for row in known}
    registered = Counter(name.rpartition("/")[0] or "AutoModelForCausalLM" for name in every)
    names = [] if chosen.page else [name for name in wanted if not (chosen.rest and name in rows)]
    for row in rows_of(names, chosen.workers, chosen.seconds):
        rows[row["type"]] = row
        data = {"environment": environment(), "registered": registered, "rows": [rows[n] for n in every if n in rows]}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"{row['type']}: {row['stage']} {row['error']} ({row.get('seconds', 0):.0f} s)", flush=True)
    PAGE.write_text(page(*(json.loads(file.read_text()) for file in (DATA, OTHER))), encoding="utf-8")


if __name__ == "__main__":
    main()
