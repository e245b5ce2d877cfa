"""Data sets by name: corpora that papers use, and those of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Mapping
from itertools import chain, count
from typing import Any

from fxprune.errors import DataError
from fxprune.graph.context import quiet

ROW_SUFFIXES = (".json", ".jsonl", ".txt", ".parquet")
"""Suffixes of the files that rows are read from."""

CORPORA: Mapping[str, Mapping[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test", "field": "text"},
    "ptb": {
        "path": "ptb-text-only/ptb_text_only",
        "name": "penn_treebank",
        "split": "validation",
        "field": "sentence",
        "revision": "refs/convert/parquet",
    },
    "c4": {
        "path": "allenai/c4",
        "split": "validation",
        "field": "text",
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    },
}
"""Data sets by name, with the split that papers evaluate on; the hub's Parquet copy if the original is a script.

Of C4 the first file of each split is taken, as by Frantar et al. (arXiv 2210.17323).
"""

_LONGEST = 300
"""Characters of another package's message that are repeated; some go on for pages."""

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def is_data_set(name: Any) -> bool:
    """Whether a text names a data set: one of :data:`CORPORA`, or ``owner/name`` of the hub, perhaps with ``:config``.

    A file that is there is no data set, nor is what has the suffix of one.
    """
    # hubs allow fewer characters, and file systems refuse far longer names
    if not isinstance(name, str) or len(name) > 200 or name.endswith(ROW_SUFFIXES):
        return False
    return (name in CORPORA or _ID.fullmatch(name) is not None) and not os.path.exists(name)


def unused_name(name: str, known: Container[str]) -> str:
    """A name that is not among those known: itself, or with a number behind it."""
    numbered = (f"{name} ({number})" for number in count(2))
    return next(one for one in chain([name], numbered) if one not in known)


def load_named(name: str, *, held_out: bool = False) -> Any:
    """Rows of a data set by its name, each with its text in the field ``text`` if it is one of :data:`CORPORA`.

    With ``held_out``, what papers evaluate on, or of others the split ``test``; else the split ``train``.
    """
    if name not in CORPORA:
        path, _, config = name.partition(":")
        return load_split(path, config or None, split="test" if held_out else "train")
    options = dict(CORPORA[name])
    field, evaluated = options.pop("field"), options.pop("split")
    rows = load_split(**options, split=evaluated if held_out else "train")
    return rows if field == "text" else rows.rename_column(field, "text")


def load_split(path: str, name: str | None = None, **options: Any) -> Any:
    """Load one split of a data set with the package ``datasets``, whose ``load_dataset`` takes all arguments."""
    where = str(options.get("data_files", path))
    try:
        import datasets
    except ImportError as error:
        what = "the package `datasets` is not installed"
        remedy = "pip install datasets, or give a .json, .jsonl or .txt file"
        raise DataError(what, where=where, remedy=remedy) from error
    try:
        with quiet():  # it logs what it raises
            return datasets.load_dataset(path, *([name] if name else []), **options)
    except Exception as error:  # the network, the hub and a data set's own loader may raise anything
        what = f"cannot be loaded: {type(error).__name__}: {str(error)[:_LONGEST]}"
        remedy = f"Give a path ending in one of {ROW_SUFFIXES}, or the id of a data set that can be reached"
        raise DataError(what, where=where, remedy=remedy) from error
