"""Upload of a folder to a hub of models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from fxprune.errors import CheckpointError

__all__ = ["check_repository", "push_folder"]

_LONGEST = 300
"""Characters of another package's message that are repeated."""


def check_repository(name: str, value: Any) -> str:
    """Return ``value``, the argument ``name``: the id of a repository on a hub, ``owner/name``."""
    remedy = "Give owner/name, in letters, digits, '-', '_' and '.'"
    if not isinstance(value, str) or value.count("/") != 1:
        raise CheckpointError("is no id of a repository", where=name, remedy=remedy, argument=name, value=value)
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        what = f"is no id of a repository: {str(error).splitlines()[0]}"
        raise CheckpointError(what, where=name, remedy=remedy, argument=name, value=value) from error
    return value


def push_folder(folder: str | os.PathLike[str], repository: str, *, private: bool | None = None) -> str:
    """Upload a checkpoint to a repository of a hub, which is made if there is none; returns its address.

    The token is that of ``hf auth login`` or of the environment variable HF_TOKEN; HF_ENDPOINT names another hub.

    Args:
        folder: what was saved.
        repository: ``owner/name``.
        private: whether a new repository is private; None as its owner has it.

    Raises:
        CheckpointError: there is no such folder, or the hub refuses it or cannot be reached.
    """
    check_repository("repository", repository)
    if not Path(folder).is_dir():
        raise CheckpointError("there is no such folder", where=str(folder), remedy="Save the model first")
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=Path(folder), commit_message="Upload a model pruned by fxprune"
        )
    except Exception as error:  # those of the hub and of the client that connects to it
        what = f"{api.endpoint} did not take it: {type(error).__name__}: {str(error).strip()[:_LONGEST]}"
        remedy = f"The model stays in {folder}; check the name and the connection, and log in with `hf auth login`"
        raise CheckpointError(what, where=repository, remedy=remedy) from error
    return str(address)
