"""Make the inputs on which the dense and the slim graph are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from fxprune.data.verification import VerificationInputs, check_names, make_inputs
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.graph.source import Source
from fxprune.masking.compare import Expected
from fxprune.pipeline.arguments import as_seed
from fxprune.pipeline.contract import Pass, PassResult

__all__ = ["MakeVerificationInputsPass"]


@dataclass(frozen=True, eq=False)
class MakeVerificationInputsPass(Pass):
    """Takes the inputs that the model was traced with if the caller gave them, else random ones.

    Args:
        example_inputs: keyword inputs to take instead.
        seed: for random ones; the same seed gives the same inputs.
    """

    name: ClassVar[str] = "make-verification-inputs"
    stage: ClassVar[str] = "prepare"
    changes: ClassVar[Change] = "nothing"
    gives: ClassVar[tuple[type[Fact], ...]] = (VerificationInputs,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Expected,)

    example_inputs: Mapping[str, Any] | None = field(default=None, metadata={"spelled": False})
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no seed, and what is no inputs by name."""
        object.__setattr__(self, "seed", as_seed("seed", self.seed))
        check_names(self.example_inputs)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the inputs."""
        facts = facts_of(graph_module)
        source = facts.get(Source)
        given = self.example_inputs
        if given is None and source is not None:
            given = source.example_inputs
        facts.put(VerificationInputs(make_inputs(graph_module, given, self.seed)))
        return PassResult(graph_module, False)
