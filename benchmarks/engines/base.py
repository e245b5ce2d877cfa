"""Interface of an engine, and the cases that are timed."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

import fxprune

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "def add(a, b):",
    "Water boils at",
)
"""Prompts after which engines are compared with transformers."""


@dataclass(frozen=True)
class Case:
    """One timed call.

    Attributes:
        phase: `prefill` (read `tokens` tokens and give the next one) or `decode` (give one more token after them).
        batch: Number of sequences.
        tokens: Tokens in each sequence.
    """

    phase: str
    batch: int
    tokens: int

    @property
    def processed(self) -> int:
        """Tokens read or generated in one call."""
        return self.batch * (self.tokens if self.phase == "prefill" else 1)

    def __str__(self) -> str:
        return f"{self.phase} {self.batch} x {self.tokens}"


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        folder: Folder of a saved model and its tokenizer.
        widths_of: Another such folder; Torch-Pruning cuts the model to the MLP widths of that one.
    """

    folder: Path
    widths_of: Path | None = None

    def beside(self, name: str) -> Path:
        """Path of a file in another format, outside the folder of the model, whose files are checked on loading."""
        return self.folder.with_name(f"{self.folder.name}-files") / name


class Engine(ABC):
    """A loaded model, run by one program.

    Args:
        source: The model to load.
        device: `cpu` or `cuda`.
        largest: Upper bound of the sequences, and of the tokens in each, of all cases.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    last_only: ClassVar[bool] = True
    """Whether the output layer runs only at the last position of a prompt."""

    writes: ClassVar[bool] = False
    """Whether it loads a file in its own format."""

    by_name_only: ClassVar[bool] = False
    """Whether it is measured only on request, and at the first shape only, because it prepares for so long."""

    @abstractmethod
    def __init__(self, source: Source, device: str, largest: Case) -> None: ...

    @abstractmethod
    def job(self, case: Case) -> Callable[[], float]:
        """Return a job that returns the seconds of one call of `case`, always on the same tokens."""

    def products(self, case: Case) -> float | None:
        """Share of a call of `case` that is spent in matrix products and attention; None if unknown."""
        return None

    @classmethod
    def prepare(cls, source: Source) -> Path:
        """Return the path to load: the folder, or a file, which is written if it does not exist."""
        return source.folder

    @classmethod
    def missing(cls, device: str) -> str:
        """The reason why it cannot run here, or an empty string."""
        if device not in cls.devices:
            return f"not measured on {device}"
        absent = [package for package in cls.packages if find_spec(package) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""

    @classmethod
    def number_bytes(cls, device: str) -> tuple[float, float]:
        """Bytes of a weight and of an element of the cache."""
        return (4, 4) if device == "cpu" else (2, 2)


def load_model(folder: Path) -> Any:
    """Load the model in a folder, saved by `fxprune` or transformers."""
    if (folder / "fxprune.json").exists():
        return fxprune.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def vocabulary_size(folder: Path) -> int:
    """Number of token ids of the model in a folder."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def token_ids(batch: int, tokens: int, vocabulary: int) -> torch.Tensor:
    """Random token ids `(batch, tokens)`, the same on every call."""
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))


def greedy_tokens(
    model: Any, prompts: Sequence[Sequence[int]], tokens: int, without: int | None = None
) -> list[list[int]]:
    """Most likely tokens after each prompt, by transformers with its cache; token `without` is never chosen."""
    found = []
    for ids in prompts:
        prompt = torch.tensor([list(ids)])
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=None if without is None else [without],
        )
        found.append(generated[0, len(ids) :].tolist())
    return found
