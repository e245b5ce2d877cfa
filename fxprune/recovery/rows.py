"""Rows of training data, read from files, hub data sets or memory; those that cannot be read are named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fxprune.data.built_in import built_in_text
from fxprune.data.rows import SUFFIXES, load_rows, numbered, rows_in_file
from fxprune.errors import DataError
from fxprune.pipeline.arguments import told

__all__ = ["read_rows"]


def read_rows(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield each row with its place, or a :class:`fxprune.data.rows.BadRow` in its stead.

    Args:
        data: none for the built-in text; a path ending in .json, .jsonl, .txt or .parquet; the id of a
            hub data set, ``"owner/name"`` or ``"owner/name:config"``, of which the split ``train`` is taken; or rows
            in memory: a ``datasets.Dataset`` or any iterable of dicts or strings.

    Raises:
        DataError: the source is not there or is not of its kind.
    """
    if data is None:
        return iter([("the built-in text", built_in_text())])
    if isinstance(data, Path) or (isinstance(data, str) and data.endswith(SUFFIXES)):
        return rows_in_file(Path(data))
    if isinstance(data, str):
        return numbered(_from_hub(data))
    if isinstance(data, Mapping | bytes | type | torch.Tensor) or not isinstance(data, Iterable):
        raise DataError(
            f"cannot read {told(data)}",
            where="data",
            remedy="Pass a path, the id of a data set, a datasets.Dataset, or a list of rows",
        )
    return numbered(data)


def _from_hub(name: str) -> Iterable[Any]:
    path, _, config = name.partition(":")
    return load_rows(path, name, *([config] if config else []))
