"""The judgement of a slim model: whether it computes what its graph does, under each attention implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import fx
from transformers import PreTrainedModel

from fxprune.emit.attention import attending, implementations
from fxprune.emit.load import run_on_meta
from fxprune.errors import VerificationError
from fxprune.graph.attempts import Refusal, attempt
from fxprune.graph.surroundings import evaluating
from fxprune.graph.tensors import on_meta
from fxprune.masking.compare import TOLERANCE, compare
from fxprune.masking.masked_run import UntouchedRun, output_tensors
from fxprune.trace.twin import alias_twin, meta_twin

__all__ = ["Judge"]

_ROUGH = 2e-2
"""Accepted difference in half precision, relative to the largest output: two orders of summation round apart."""


@dataclass
class Judge:
    """Says whether an emitted model computes what the slim graph does.

    Args:
        slim: the slim graph.
        dense: the dense model; not changed. Its storage may be on ``meta``.
        inputs: keyword inputs of both.
    """

    slim: fx.GraphModule
    dense: PreTrainedModel
    inputs: Mapping[str, torch.Tensor]

    def __call__(self, candidate: PreTrainedModel) -> bool:
        """Return whether outputs are the same, in evaluation mode, whatever mode the model is in.

        An implementation under which the dense model does not run, or computes something else than under its own, says
        nothing about a candidate.

        Raises:
            VerificationError: it fails under another attention implementation than its own, and the dense model does
                not.
        """
        if on_meta(self.slim):
            return True
        own, *others = implementations(candidate)
        with evaluating(candidate):
            got = _outputs(candidate, self.inputs, own)
            if isinstance(got, Refusal):
                raise got.error
            if got is None or not _agree(self._wanted, got):
                return False
            for name in others:
                fault = _fault(self._wanted, _outputs(candidate, self.inputs, name))
                if fault and self._stands(name, crashed=fault != _DIFFERS):
                    raise VerificationError(fault, where=f"under {name} attention", remedy=_REMEDY)
        return True

    def agrees(self, candidate: PreTrainedModel) -> bool:
        """Return whether outputs are the same under the implementation of attention that the model has."""
        if on_meta(self.slim):
            return True
        with evaluating(candidate):
            got = _outputs(candidate, self.inputs, implementations(candidate)[0])
        return isinstance(got, torch.Tensor) and _agree(self._wanted, got)

    @cached_property
    def _wanted(self) -> torch.Tensor:
        with torch.no_grad():
            return output_tensors(UntouchedRun(self.slim).run(*self.inputs.values()))[0]

    def _stands(self, name: str, *, crashed: bool) -> bool:
        """Whether the dense model passes under an attention implementation what a candidate failed.

        Without values only the shapes that it works with can be tried.
        """
        if any(p.is_meta for p in self.dense.parameters()):
            return crashed and run_on_meta(meta_twin(self.dense), implementation=name) is None  # type: ignore[arg-type]
        first, *_ = implementations(self.dense)
        twin: PreTrainedModel = alias_twin(self.dense)  # type: ignore[assignment]
        want = _outputs(twin, self.inputs, first)
        return isinstance(want, torch.Tensor) and not _fault(want, _outputs(twin, self.inputs, name))


_DIFFERS = "it computes something else"
_REMEDY = "Use the graph, or report the model's config"


def _fault(want: torch.Tensor, got: torch.Tensor | Refusal | None) -> str:
    """Return what is wrong with an output, in words; empty where nothing is, or the implementation is not there."""
    if isinstance(got, Refusal):
        return f"it does not run: {got}"
    return "" if got is None or _agree(want, got) else _DIFFERS


def _outputs(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], implementation: str
) -> torch.Tensor | Refusal | None:
    """Return the first output of a model under an attention implementation; None where it does not take that one."""
    with attending(model, implementation) as taken, torch.no_grad():
        found = attempt(partial(model, **inputs, use_cache=False)) if taken else None
    return found if found is None or isinstance(found, Refusal) else output_tensors(found)[0]


def _agree(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether two outputs are equal but for rounding.

    In half precision that is asked of half of the tokens: a router that rounds otherwise may send single ones to others
    of its experts.
    """
    if want.shape != got.shape or want.dtype in (torch.float32, torch.float64):
        return compare([want.float()], [got.float()]) <= TOLERANCE
    apart = (want.float() - got.float()).abs().amax(dim=-1).median()
    return bool(apart <= _ROUGH * max(1.0, float(want.abs().max())))
