"""Make the slim Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxprune.data.verification import VerificationInputs
from fxprune.emit.emitted import Emitted, emit_from_graph
from fxprune.emit.own_forward import check_own_forward
from fxprune.graph.facts import Change, Fact, Runnable, facts_of
from fxprune.graph.source import Source
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.norms import scaled_numbers
from fxprune.removal.removal import Removed
from fxprune.trace.inputs import is_hugging_face

__all__ = ["EmitModelPass"]


@dataclass(frozen=True, eq=False)
class EmitModelPass(Pass):
    """Builds a model of the dense one's class that holds the slim tensors, or says why there can be none.

    In place on a graph that shares its tensors with the model it was traced from, that model becomes the slim one. One
    that is no Hugging Face model keeps its code, which has to compute with what is left what the graph does.
    The dense model is let go of afterwards: whoever needs it traces it again.
    """

    name: ClassVar[str] = "emit-model"
    stage: ClassVar[str] = "emit"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Source, Removed, VerificationInputs, Runnable)
    gives: ClassVar[tuple[type[Fact], ...]] = (Emitted,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Source,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the model.

        Raises:
            PlanError: the tensors of a module that is no Hugging Face model were cut, and its code cannot do with the
                rest.
        """
        facts = facts_of(graph_module)
        source = facts[Source]
        if not is_hugging_face(source.model):
            removal = facts[Removed].removal
            if source.shares and (removal.kept or removal.removed_blocks):
                numbers = scaled_numbers(removal.axes, removal.keep)
                check_own_forward(graph_module, source, facts[VerificationInputs].values, numbers)
            facts.put(Emitted(None, ("the model passed is not a Hugging Face model",)))
            return PassResult(graph_module, False)
        emission = emit_from_graph(graph_module, source, facts[Removed].removal, facts[VerificationInputs].values)
        model = emission.model
        if model is not None and source.shares:
            _become(source.model, model)
            model = source.model  # type: ignore[assignment]
        facts.put(Emitted(model, emission.reasons))
        return PassResult(graph_module, False)


def _become(model: nn.Module, slim: nn.Module) -> None:
    """Turn the dense model the caller holds into the slim one."""
    model.__dict__.clear()
    model.__dict__.update(slim.__dict__)
