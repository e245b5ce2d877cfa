"""A candidate that runs under one attention implementation and not under another, with one attribute changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from fxprune.emit.assemble import Candidate

__all__ = ["mended"]

_LARGEST = 16
"""Attributes that are quotients of numbers of heads are small; what is larger is a width."""


def mended(candidate: Candidate, tensors: Collection[str]) -> Iterator[Candidate]:
    """Yield a candidate with one small integer attribute divided, in all modules where it is the same number.

    Where widths were set by hand, an attribute of the module around them, such as how many queries share a key, may be
    the one of more heads: one kernel works it out from shapes, another reads it.

    Args:
        candidate: what fails.
        tensors: names of tensors; modules that own one have widths for attributes, which are right already.
    """
    owners = {name.rpartition(".")[0] for name in tensors}
    attributes = candidate.recipe.attributes
    found = {
        (value, name)
        for path, here in attributes.items()
        for name, value in here.items()
        if path not in owners and isinstance(value, int) and 1 < value <= _LARGEST
    }
    for value, name in sorted(found):
        for smaller in (n for n in range(1, value) if value % n == 0):
            changed = {
                path: {**here, name: smaller} if path not in owners and here.get(name) == value else here
                for path, here in attributes.items()
            }
            yield dataclasses.replace(candidate, recipe=dataclasses.replace(candidate.recipe, attributes=changed))
