"""The pass contract.

A pass takes a graph module and returns torch's ``PassResult``. It declares what must be known before
(:meth:`Pass.requires`) and what it promises (:meth:`Pass.ensures`, which here is handed the *result*; torch's stock
class hands it the input), and whether it changes the graph or only learns about it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxprune.errors import PassError
from fxprune.state import State, state_of

__all__ = ["Pass", "PassResult"]


class Pass(PassBase):
    """One step of the suite.

    Subclasses are dataclasses whose fields are the pass's arguments (``eq=False``), named ``VerbNounPass``, with a
    kebab-case :attr:`name` under which they are registered.
    """

    name: ClassVar[str]
    stage: ClassVar[str] = ""
    """Which stage it belongs to: ``discover``, ``importance``, ``select``, ``compensate``, ``shrink`` or ``verify``."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of the state that must be filled before."""
    gives: ClassVar[tuple[str, ...]] = ()
    """Fields of the state that are filled after."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Check, run, check.

        Raises:
            PassError: something required is missing, or something promised was not delivered.
        """
        self.requires(graph_module)
        result = self.call(graph_module)
        self.ensures(result.graph_module)
        return result

    @abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Do the work."""

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise :class:`~fxprune.errors.PassError` unless all of :attr:`needs` is known."""
        self._check(state_of(graph_module), self.needs, "needs", "Run the pass that finds it first")

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Raise :class:`~fxprune.errors.PassError` unless all of :attr:`gives` is known."""
        self._check(state_of(graph_module), self.gives, "did not provide", "This is a defect of the pass")

    def _check(self, state: State, fields: tuple[str, ...], verb: str, remedy: str) -> None:
        for field in fields:
            value = getattr(state, field)
            if value is None or (isinstance(value, tuple) and not value):
                raise PassError(f"{verb} {field!r}", where=f"pass {self.name}", remedy=remedy)
