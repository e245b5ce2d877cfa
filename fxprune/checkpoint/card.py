"""The model card of a checkpoint: what a person who finds the folder has to know."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from fxprune.checkpoint.classes import stock_class
from fxprune.checkpoint.manifest import Manifest
from fxprune.graph.attempts import Refusal, attempt
from fxprune.graph.silence import quiet
from fxprune.removal.page import headlines, kinds_of
from fxprune.removal.report import Report

__all__ = ["model_card"]

_TEMPLATE = Path(__file__).with_name("card.md")

_ON_A_HUB = re.compile(r"[\w.-]+/[\w.-]+")
"""What the id of a model on a hub looks like."""

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What holds of the slim model too, where the card of the dense one says it."""


def model_card(model: PreTrainedModel, work: Path, folder: Path, manifest: Manifest, report: Report | None) -> str:
    """Return the text of the card.

    Args:
        model: the slim model.
        work: where its files were written.
        folder: what the reader will know the checkpoint by.
        manifest: of the checkpoint.
        report: what was done; None where it is not known.
    """
    source = str(getattr(model.config, "_name_or_path", "") or "")
    base = source if _ON_A_HUB.fullmatch(source) and not Path(source).exists() else None
    data = ModelCardData(
        library_name="transformers", base_model=base, tags=["fxprune", "pruned"], **_from_dense(Path(source))
    )
    classes = json.loads((work / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    card = ModelCard.from_template(
        data,
        str(_TEMPLATE),
        name=base or Path(source).name,
        kind=stock_class(model).__name__,
        folder=folder.name,
        stock=manifest.stock,
        auto_class=next((name for name in reversed(classes) if name != "AutoConfig"), None),
        serves=report is None or not report.removed_blocks,
        plan=manifest.plan is not None,
        versions=manifest.versions,
        report=report,
        headlines=() if report is None else headlines(report),
        kinds=() if report is None else tuple(kinds_of(report)),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card).rstrip()) + "\n"  # what was left out leaves its blank lines


def _from_dense(folder: Path) -> dict[str, Any]:
    """Return what the card in the dense model's folder says of license and language; nothing where there is none."""
    file = folder / "README.md"
    if not folder.name or not file.is_file():
        return {}
    with quiet(logging.WARNING):  # one without a head is no card, and no reason to warn
        card = attempt(ModelCard.load, file, ignore_metadata_errors=True)
    if isinstance(card, Refusal):
        return {}
    said = card.data.to_dict()
    return {name: said[name] for name in _KEPT if name in said}
