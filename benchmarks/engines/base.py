"""What an engine is to the benchmark."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

import fxprune
from benchmarks.latency.work import Case

__all__ = ["Engine", "Source", "load_model", "token_ids", "vocabulary_of"]


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        folder: A saved model and its tokenizer.
        widths_of: Another such folder: Torch-Pruning gives the model the MLP widths of that one.
    """

    folder: Path
    widths_of: Path | None = None

    def beside(self, name: str) -> Path:
        """Where a file of another format is: not among those of the model, which are checked when they are loaded."""
        return self.folder.with_name(f"{self.folder.name}-files") / name


class Engine(ABC):
    """A loaded model, run by one program.

    Args:
        source: What is loaded.
        device: `cpu` or `cuda`.
        largest: The cases that will be asked for hold no more sequences, and no more tokens in each, than this one.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    last_only: ClassVar[bool] = True
    """Whether the output layer runs at the last position alone when a prompt is read."""

    writes: ClassVar[bool] = False
    """Whether it loads a file of its own."""

    by_name_only: ClassVar[bool] = False
    """Whether getting ready takes so long that it is measured where it is asked for alone, and at the first shape."""

    @abstractmethod
    def __init__(self, source: Source, device: str, largest: Case) -> None: ...

    @abstractmethod
    def job(self, case: Case) -> Callable[[], float]:
        """Return a job that returns the seconds of one call of `case`, on tokens that are always the same."""

    def products(self, case: Case) -> float | None:
        """The part of a call of `case` that goes into matrix products and attention; None where that cannot be told."""
        return None

    @classmethod
    def prepare(cls, source: Source) -> Path:
        """Return what is loaded: the folder, or a file that is written where it is not there yet."""
        return source.folder

    @classmethod
    def missing(cls, device: str) -> str:
        """Why it cannot run here; empty where it can."""
        if device not in cls.devices:
            return f"not measured on {device}"
        absent = [package for package in cls.packages if find_spec(package) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""

    @classmethod
    def number_bytes(cls, device: str) -> tuple[float, float]:
        """Bytes of a weight and of a number in the cache."""
        return (4, 4) if device == "cpu" else (2, 2)


def load_model(folder: Path) -> Any:
    """The model in a folder, whichever package saved it."""
    if (folder / "fxprune.json").exists():
        return fxprune.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def vocabulary_of(folder: Path) -> int:
    """How many token ids the model in a folder knows."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def token_ids(batch: int, tokens: int, vocabulary: int) -> torch.Tensor:
    """Token ids `(batch, tokens)`, the same each time."""
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))
