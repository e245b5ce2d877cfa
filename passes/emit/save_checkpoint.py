"""Save what was emitted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import fx
from transformers import AutoTokenizer

from fxprune.checkpoint import save_pretrained
from fxprune.checkpoint.write import check_request
from fxprune.dot.inline import layer_svg
from fxprune.emit.emitted import Emitted
from fxprune.errors import CheckpointError
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import Removed
from fxprune.removal.report import Report

__all__ = ["SaveCheckpointPass", "Saved"]


@dataclass(frozen=True)
class Saved(Fact):
    """The slim model is on disk.

    Args:
        folder: where.
        is_stock: whether stock transformers loads it by its config alone.
    """

    folder: Path
    is_stock: bool


@dataclass(frozen=True, eq=False)
class SaveCheckpointPass(Pass):
    """Writes the slim Hugging Face model with its plan and report to a folder; see :func:`fxprune.save_pretrained`.

    Args:
        folder: where to.
        tokenizer: saved with it; a tokenizer, or the folder of one.
        max_shard_size: the largest file of weights, in bytes or as text such as ``"5GB"``.
    """

    name: ClassVar[str] = "save-checkpoint"
    stage: ClassVar[str] = "emit"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Emitted, Removed, Report)
    gives: ClassVar[tuple[type[Fact], ...]] = (Saved,)

    folder: str = ""
    tokenizer: Any = None
    max_shard_size: int | str = "5GB"

    def check_arguments(self) -> None:
        """Raise where it is not said where to, or nothing could be written there.

        Raises:
            CheckpointError: there is no folder, or an argument is of the wrong type.
        """
        tokenizer = None if isinstance(self.tokenizer, str) else self.tokenizer
        check_request(self.folder or "slim", tokenizer, self.max_shard_size)
        if not self.folder:
            raise CheckpointError("no folder", where=f"pass {self.name}", remedy="Write save-checkpoint{folder=slim}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Write all of it, or nothing.

        Raises:
            CheckpointError: there is no slim Hugging Face model, or the folder holds something else.
        """
        facts = facts_of(graph_module)
        plan = facts[Removed].removal.plan
        structure = save_pretrained(
            facts[Emitted].require_model(),
            self.folder,
            self._tokenizer(),
            plan=plan,
            report=replace(facts[Report], picture=layer_svg(graph_module, plan.norm)),
            max_shard_size=self.max_shard_size,
        )
        facts.put(Saved(Path(self.folder), structure.is_stock))
        return PassResult(graph_module, False)

    def _tokenizer(self) -> Any:
        return self.tokenizer if not isinstance(self.tokenizer, str) else AutoTokenizer.from_pretrained(self.tokenizer)
