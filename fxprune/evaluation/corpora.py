"""Texts to measure perplexity on: the two of the paper, files, or text itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fxprune.data.text import read_text
from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.pipeline.arguments import refuse

__all__ = ["CORPORA", "load_corpus", "named_corpora"]

CORPORA: Mapping[str, Mapping[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test", "field": "text"},
    "ptb": {
        "path": "ptb-text-only/ptb_text_only",
        "name": "penn_treebank",
        "split": "validation",
        "field": "sentence",
        "revision": "refs/convert/parquet",
    },
}
"""Data sets by name, in the splits that the paper measures; the hub's Parquet copy where the original is a script."""

_FILES = (".txt", ".jsonl", ".json")


def named_corpora(texts: str | Path | Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, str | Path]:
    """Return what to measure on, by name.

    Args:
        texts: names out of :data:`CORPORA` and paths, alone or in a sequence; or a mapping from names of your own to
            those, or to text itself.
    """
    wanted = "names of texts, paths of files, or a mapping from names to these or to text itself"
    given: Any = texts
    if isinstance(given, bytes) or not isinstance(given, str | Path | Iterable):
        raise refuse("texts", given, wanted, EvaluationError)
    named = dict(texts) if isinstance(texts, Mapping) else {}
    items = named.values() if named else [texts] if isinstance(texts, str | Path) else list(texts)
    for item in (*items, *named):
        if not isinstance(item, str | Path) or not str(item):
            raise refuse("texts", item, wanted, EvaluationError)
    if isinstance(texts, Mapping):
        return named
    return {str(item) if str(item) in CORPORA else Path(item).stem: item for item in items}


def load_corpus(source: str | Path) -> str:
    """Return the text of a known corpus, of a local file, or ``source`` itself where it holds a line break or a blank.

    Raises:
        UnknownNameError: neither a known corpus nor a file.
        EvaluationError: the data set cannot be loaded.
    """
    if isinstance(source, str) and source in CORPORA:
        return _from_hub(**CORPORA[source])
    path = Path(source)
    if isinstance(source, str) and path.suffix not in _FILES and (" " in source or "\n" in source):
        return source
    if not path.is_file():
        raise UnknownNameError("corpus", str(source), CORPORA)
    return read_text(path)


def _from_hub(field: str, **where: Any) -> str:
    try:
        import datasets
    except ImportError as error:
        raise EvaluationError(
            "the package `datasets` is not installed",
            where=where["path"],
            remedy="pip install 'fxprune[eval]', or give a local text file",
        ) from error
    try:
        rows = datasets.load_dataset(**where)
    except Exception as error:  # the network, the hub and the loader of the data set raise what they like
        raise EvaluationError(
            f"cannot be loaded: {type(error).__name__}: {error}",
            where=where["path"],
            remedy="Check the connection, or give a local text file",
        ) from error
    return "\n\n".join(rows[field])
