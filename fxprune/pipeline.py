"""Passes one after the other."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

from torch import fx

from fxprune.errors import FxpruneError, PassError
from fxprune.passbase import Pass, PassResult
from fxprune.registry import load_pass

__all__ = ["Pipeline", "parse_pass"]


class Pipeline:
    """A sequence of passes, itself callable like one.

    Args:
        passes: passes, or names as in ``"taylor{order=mix reduction=sum}"``.
        on_pass: called with each pass before it runs, for progress.
    """

    def __init__(self, passes: Sequence[Pass | str], on_pass: Callable[[Pass], None] | None = None) -> None:
        self.passes = tuple(parse_pass(p) if isinstance(p, str) else p for p in passes)
        self.on_pass = on_pass

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run all passes on ``graph_module``.

        Raises:
            FxpruneError: whatever a pass raises, with a note that names the pass.
        """
        modified = False
        for step in self.passes:
            if self.on_pass is not None:
                self.on_pass(step)
            try:
                result = step(graph_module)
            except FxpruneError as error:
                error.add_note(f"in pass {step.name}")
                raise
            graph_module, modified = result.graph_module, modified or result.modified
        return PassResult(graph_module, modified)


def parse_pass(text: str) -> Pass:
    """The pass spelled ``name`` or ``name{key=value key=value}``; values are Python literals or bare words.

    Raises:
        PassError: the text is not of that form.
        UnknownNameError: no such pass or argument.
    """
    name, brace, rest = text.strip().partition("{")
    if brace and not rest.endswith("}"):
        raise PassError("no closing brace", where=text, remedy="Write it as name{key=value key=value}")
    arguments = {}
    for item in rest[:-1].split() if brace else ():
        key, equals, value = item.partition("=")
        if not equals:
            raise PassError(f"{item!r} is not key=value", where=text, remedy="Write it as name{key=value key=value}")
        arguments[key.replace("-", "_")] = _value(value)
    return load_pass(name.strip(), **arguments)


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
