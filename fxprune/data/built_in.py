"""Text that comes with the package and with Python, available offline: for calibration, training and measurements."""

from __future__ import annotations

import ast
import sysconfig
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fxprune.data.calibration import spread
from fxprune.data.files import calibration_text
from fxprune.data.text import join, paragraphs, token_windows
from fxprune.errors import CalibrationError

__all__ = [
    "CHARACTERS",
    "built_in_samples",
    "built_in_text",
    "general_chats",
    "general_samples",
    "general_text",
    "offline_docstrings",
    "offline_text",
]

CHARACTERS = 4
"""A token of English text stands for, about: of the general part, 4.06 with the tokenizer of the demo model."""


def general_text() -> str:
    """Return English of many kinds, about 130,000 characters, the same on every call.

    Articles as an encyclopedia has them, pages as the web has them, stories, letters and speeches, questions with their
    answers, and a few short programs, in turn, so that any part of it has all of them. It was written for this package.
    """
    return files(__package__).joinpath("general.txt").read_text(encoding="utf-8").rstrip("\n")


def general_chats(tokenizer: Any) -> str:
    """Return short chats, in the template of a tokenizer, the same on every call; empty if it has none for them.

    Questions and tasks of many kinds with their answers, 250 of them, written for this package.

    Args:
        tokenizer: one of transformers.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ""
    with as_file(files(__package__).joinpath("chats.jsonl")) as path:
        try:
            return calibration_text(path, tokenizer)
        except CalibrationError:  # a template of other roles, or for something else than chats
            return ""


def offline_text() -> str:
    """Return English prose from the standard library, about 370,000 characters, the same on every call.

    The text is ``pydoc_data.topics``, the language reference that ``help()`` prints, with topics in
    alphabetical order. Topics quote each other at length: a fifth of the raw text is repetition. Each
    paragraph is kept where it first appears, so that no two parts of the text share one. It differs a
    little from one Python version to the next; report the version with numbers.
    """
    from pydoc_data.topics import topics

    return join(dict.fromkeys(p for name in sorted(topics) for p in paragraphs(topics[name])))


_DOCUMENTED = (
    "argparse collections/__init__ contextlib datetime decimal difflib email/message fractions functools http/client "
    "inspect logging/__init__ mailbox optparse os pathlib random shutil socketserver statistics string subprocess "
    "tarfile tempfile textwrap threading typing unittest/case unittest/mock urllib/request"
)
"""Modules of the standard library with much to say about themselves."""

_SENTENCE = 80
"""Characters: what is shorter is a heading, a signature or an item of a list more often than a sentence."""


def offline_docstrings() -> str:
    """Return prose from docstrings of the standard library, about 150,000 characters, the same on every call.

    It is English of another kind than :func:`offline_text` and shares no paragraph with it; examples of code are left
    out. It too differs a little from one Python version to the next.
    """
    library, seen = Path(sysconfig.get_path("stdlib")), set(paragraphs(offline_text()))
    found: dict[str, None] = {}
    for name in _DOCUMENTED.split():
        tree = ast.parse((library / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                prose = paragraphs(ast.get_docstring(node) or "")
                found.update((p, None) for p in prose if _is_prose(p) and p not in seen)
    return join(found)


def _is_prose(paragraph: str) -> bool:
    return len(paragraph) > _SENTENCE and paragraph[0].isupper() and ">>>" not in paragraph


def built_in_text() -> str:
    """Return the built-in text: :func:`general_text`, then :func:`offline_text`."""
    return join([general_text(), offline_text()])


def general_samples(tokens: int) -> int:
    """Return about how many samples the general part of the built-in text has, chats not counted.

    Args:
        tokens: of a sample.
    """
    return len(general_text()) // (CHARACTERS * tokens)


def built_in_samples(
    tokenizer: PreTrainedTokenizerBase, tokens: int, samples: int | None = None, beyond: bool = True
) -> torch.Tensor:
    """Return samples of the built-in text: of its general part as far as that goes, the rest of documentation.

    The general part is :func:`general_text`, and for a tokenizer with a template for chats :func:`general_chats`.

    Args:
        tokenizer: turns text into ids.
        tokens: of a sample.
        samples: how many, evenly spread over what they are taken of; None for all there are.
        beyond: whether documentation is taken where more are wanted than the general part has.

    Returns:
        Token ids ``(samples, tokens)``.

    Raises:
        DataError: samples are longer than the text, or a number is not positive.
    """
    text = join(filter(None, (general_text(), general_chats(tokenizer))))
    windows = token_windows(tokenizer, join([text, offline_text()]), tokens)
    places = range(len(windows))
    general = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) // tokens
    taken = list(spread(places[:general], samples))
    if beyond:
        taken += spread(places[general:], None if samples is None else max(0, samples - general))
    return windows[taken]
