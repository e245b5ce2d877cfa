"""Findings shared by pipelines: a pass that finds the same again gives the facts that it gave before."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxprune.graph.facts import Fact, Notes, add_note, facts_of, reading
from fxprune.graph.tensors import weights

__all__ = ["digest_of", "remembered", "shared_tensor", "sharing"]

_SHARED = ("prepare", "discover", "importance", "teach")
"""Stages that cost much, and find out about the dense model what selections of all sizes need."""


_MOST = 1 << 30
"""Bytes of tensors that are kept."""


@dataclass
class _Findings:
    """What passes gave, by the pass, the facts that it read, and the weights; with all that the keys are made of."""

    given: dict[Any, tuple[tuple[Fact, ...], tuple[str, ...], Any]] = field(default_factory=dict)
    tensors: dict[Any, torch.Tensor] = field(default_factory=dict)
    digests: dict[int, tuple[weakref.ref[torch.Tensor], int, str]] = field(default_factory=dict)

    def key(self, step: Any, graph_module: fx.GraphModule) -> tuple[Any, ...]:
        facts = facts_of(graph_module)
        read = tuple(_identity(facts.get(kind)) for kind in (*step.needs, *step.wants))
        nodes = hash(tuple(node.name for node in graph_module.graph.nodes))
        return _identity(step), read, nodes, tuple(self._digest(tensor) for _, tensor in weights(graph_module))

    def _digest(self, tensor: torch.Tensor) -> str:
        """The digest of a tensor, worked out once while it stays as it is."""
        version = 0 if tensor.is_inference() else tensor._version
        known = self.digests.get(id(tensor))
        if known is None or known[0]() is not tensor or known[1] != version:
            known = weakref.ref(tensor), version, digest_of(tensor)
            self.digests[id(tensor)] = known
        return known[2]


_FINDINGS: ContextVar[_Findings | None] = ContextVar("findings", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Let passes of the dense model that find the same twice inside this context do so once."""
    token = _FINDINGS.set(_Findings())
    try:
        yield
    finally:
        _FINDINGS.reset(token)


def remembered(step: Any, run: Callable[[fx.GraphModule], PassResult], graph_module: fx.GraphModule) -> PassResult:
    """Run a pass on a graph, or give the facts that it gave where it read the same."""
    findings = _FINDINGS.get()
    if findings is None or step.changes != "nothing" or step.stage not in _SHARED:
        return run(graph_module)
    with reading("", None):
        key, facts = findings.key(step, graph_module), facts_of(graph_module)
        if key in findings.given:
            given, notes, _ = findings.given[key]
            for kind in step.drops:
                facts.drop(kind, step.name)
            for fact in given:
                facts.put(fact)
            for line in notes:
                add_note(graph_module, line)
            return PassResult(graph_module, False)
        read = tuple(facts.get(kind) for kind in (*step.needs, *step.wants))
        before = facts.get(Notes) or Notes()
    result = run(graph_module)
    with reading("", None):
        new = tuple(line for line in (facts.get(Notes) or Notes()).lines if line not in before.lines)
        findings.given[key] = tuple(facts[kind] for kind in step.gives), new, (step, read)
    return result


def shared_tensor(key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A tensor that is made once inside :func:`sharing`, as far as all of them fit into a gigabyte.

    Args:
        key: what tells it from others for as long as that context lasts.
        make: makes it.
    """
    findings = _FINDINGS.get()
    if findings is None:
        return make()
    value = findings.tensors.get(key)
    if value is None:
        value = make()
        if value.nbytes + sum(one.nbytes for one in findings.tensors.values()) <= _MOST:
            findings.tensors[key] = value
    return value


def digest_of(tensor: torch.Tensor) -> str:
    """A digest of the values of a tensor."""
    content = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=16).hexdigest()


def _identity(value: Any) -> Any:
    """What tells a value from others: passes and facts by their fields, other objects by being the same."""
    if isinstance(value, Fact | PassBase):
        return type(value), *(_identity(getattr(value, one.name)) for one in fields(value))  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    return value if value is None or isinstance(value, str | int | float) else (id(value),)
