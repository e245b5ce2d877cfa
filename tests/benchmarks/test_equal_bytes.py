"""Test the benchmark of quantised and pruned files: turns, ratios, and its section of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

import benchmarks.equal_bytes as benchmark
from benchmarks.common import write_results
from benchmarks.pages import results_page


class Server:
    """Files that predict and decode as their size says."""

    asked: ClassVar[list[str]] = []

    def __init__(self, path: Path, **_: Any) -> None:
        self.path = path

    def log_probability(self, tokens: list[int], following: int) -> float:
        return -self.path.stat().st_size / 100

    def complete(self, tokens: list[int], **_: Any) -> dict[str, Any]:
        self.asked.append(self.path.name)
        return {"timings": {"predicted_per_token_ms": self.path.stat().st_size}}


def test_files_take_turns_and_are_set_beside_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LlamaServer", Server)
    sizes = {"dense f16": 100, "dense q4_k_m": 40, "slim f16": 80, "slim q4_k_m": 20}
    files = {name: tmp_path / name for name in sizes}
    for name, path in files.items():
        path.write_bytes(bytes(sizes[name]))
    found = benchmark.measure(files, {"a text": [[1, 2, 3], [4, 5]]}, rounds=2)
    assert Server.asked == [*files, *files]
    rows = benchmark.rows_of(found, {"a text": 10})
    assert [(row["model"], row["type"]) for row in rows] == [tuple(name.split()) for name in
            ("dense f16", "slim f16", "dense q4_k_m", "slim q4_k_m")]  # fmt: skip
    last = rows[-1]["texts"]["a text"]
    assert last["over_dense"] == pytest.approx((0.2, 0)) and last["over_own"] == pytest.approx((0.25, 0))
    assert rows[-1]["speed_up"] == [5, 5, 5]
    settings = {"pieces": {"a text": 2}, "rounds": 2, "parameters": {"dense": 10, "slim": 8}}
    write_results(tmp_path / "equal_bytes.json", {"settings": settings, "rows": rows})
    page = results_page(tmp_path)
    assert "| slim | q4_k_m | 0.0 |" in page and "-80.0%" in page
