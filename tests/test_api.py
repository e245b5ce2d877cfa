"""The face: options that cannot work are refused before anything is traced; see end_to_end for what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxprune.api
from fxprune.api import prune, prune_pipeline
from fxprune.data.samples import read_calibration
from fxprune.errors import ArgumentError, CalibrationError
from fxprune.pipeline.registry import load_pass
from tests.models import tiny
from tests.remembered import traced


def test_passes_are_taken_as_they_are() -> None:
    mine = load_pass("l1", kinds=("channel",))
    assert prune_pipeline(importance=mine, verify=False).passes[1] is mine


def test_weights_of_a_module_cannot_be_offloaded() -> None:
    with pytest.raises(ArgumentError, match="the weights of a module are in memory already"):
        prune(torch.nn.Linear(2, 2), offload="work")


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (IDS + 125, "input_ids holds 136, the model knows 0 to 130"),
        ("{'input_ids': [1, 2, 300]}", "input_ids holds 300"),
        ("", "the calibration data is empty"),
    ],
)
def test_samples_that_the_model_cannot_read_are_refused_before_it_is_traced(
    data: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A string stands for the content of a file that the recipe reads."""
    monkeypatch.setattr(fxprune.api, "trace", lambda *_: pytest.fail("traced"))
    options: dict[str, Any] = {"importance": "wanda"}
    if isinstance(data, str):
        (tmp_path / "rows.jsonl").write_text(data.replace("'", '"'))
        file = str(tmp_path / "rows.jsonl")
        options = {"recipe": f"calibrate{{file={file!r}}}, find-groups, wanda, select-by-ratio, shrink"}
        data = None
    with pytest.raises(CalibrationError, match=text):
        prune(tiny("llama"), data, **options)


def test_samples_of_two_bytes_a_token_are_read() -> None:
    """Ids of numpy's uint16, as corpora of ids are stored in, were refused with an overflow."""
    made = read_calibration(IDS.numpy().astype(np.uint16), traced("llama"))
    assert torch.equal(torch.cat([sample.inputs["input_ids"] for sample in made]), IDS)
