"""Words that arguments take and names of files that are looked for, where checking them must need no torch."""

from __future__ import annotations

from typing import Literal

__all__ = ["EXACT", "KINDS", "MANIFEST", "NORMS", "ORDERS", "RANKINGS", "REACHES", "SUFFIXES", "Kind"]

Kind = Literal["mlp", "head", "channel", "head_dim", "expert", "layer"]

KINDS: tuple[Kind, ...] = ("mlp", "head", "channel", "head_dim", "expert", "layer")

EXACT = "exact-"
"""In front of a kind: only those of its groups that no norm or other statistic runs over."""

NORMS = ("sliced", "masked")
"""What becomes of a norm over fewer units: an average of those that stay, or what it is with the others masked."""

ORDERS = ("vector", "first", "second", "mix")
"""Of the Taylor expansion of the loss."""

RANKINGS = ("local", "global")
"""Whether scores are compared inside a group, or anywhere."""

REACHES = ("lost", "stream", "all")
"""Which products are fitted: those that lost inputs; and those whose output is added to a value that changed; and all
in blocks behind the first that lost inputs."""

SUFFIXES = (".pt2", ".onnx", ".gguf")
"""How names of files end that a model is exported to."""

MANIFEST = "fxprune.json"
"""The file that says of a folder that it is a checkpoint of this package."""
