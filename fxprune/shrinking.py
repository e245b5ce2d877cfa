"""From a plan to a slim graph, checked, and a slim model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxprune.checkpoint import Structure, save_pretrained
from fxprune.dependency import axis_map
from fxprune.emit import Emission, emit
from fxprune.errors import CheckpointError
from fxprune.export import export_graph
from fxprune.fork import fork
from fxprune.macs import TOKENS, count_macs, count_parameters
from fxprune.masking import output_tensors
from fxprune.passbase import Pass
from fxprune.pipeline import Pipeline
from fxprune.plan import Plan, kept_of_constants
from fxprune.probe import make_probe
from fxprune.registry import load_pass
from fxprune.report import Report, frozen_reasons, widths_of
from fxprune.rules.base import Axis
from fxprune.state import State, state_of
from fxprune.tensors import names_by_identity, weights
from fxprune.trace import Traced
from fxprune.trace.capture import meta_twin
from fxprune.trace.inputs import is_hugging_face
from fxprune.verify import compare

__all__ = ["Result", "shrink"]


@dataclass(frozen=True)
class Result:
    """A slim model in two forms, and how it came about.

    Args:
        graph_module: the slim graph; trains, moves, compiles.
        model: the slim Hugging Face model, sharing its tensors with ``graph_module``; None where the model is not
            one or its classes cannot express the plan, with the reason in ``report.model_reasons``.
        plan: which indices of which parameter stayed.
        report: numbers before and after.
    """

    graph_module: fx.GraphModule
    model: Any
    plan: Plan
    report: Report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the slim graph."""
        return self.graph_module(*args, **kwargs)

    def save_pretrained(
        self, folder: str | os.PathLike[str], tokenizer: Any = None, *, max_shard_size: int | str = "5GB"
    ) -> Structure:
        """The folder holds the slim model with its plan and report; see :func:`fxprune.save_pretrained`.

        Raises:
            CheckpointError: there is no slim Hugging Face model, or the folder holds something else.
        """
        if self.model is None:
            why = "; ".join(self.report.model_reasons[:3])
            raise CheckpointError(
                f"there is no slim model to save: {why}",
                where="model",
                remedy="Export the graph instead: result.export('model.pt2')",
            )
        return save_pretrained(
            self.model, folder, tokenizer, plan=self.plan, report=self.report, max_shard_size=max_shard_size
        )

    def export(
        self, path: str | os.PathLike[str], *, example_inputs: Mapping[str, Any] | None = None, verify: bool = True
    ) -> Path:
        """``path`` holds the slim graph as a program: ``.pt2`` or ``.onnx``; see :func:`fxprune.export_graph`.

        Raises:
            UnknownNameError: the suffix is neither of the two.
            ExportError: the graph cannot be exported, or the packages for ONNX are missing.
            VerificationError: the program computes something else; nothing is written.
        """
        return export_graph(self.graph_module, path, example_inputs=example_inputs, verify=verify)


def shrink(
    traced: Traced,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    verify: bool = True,
    inplace: bool = False,
    asked: Mapping[str, float | None] | None = None,
    compensate: Pass | None = None,
) -> Result:
    """Carry out the plan in the state of ``traced``.

    Args:
        traced: the dense model, with groups, kept units and plan in its state.
        example_inputs: the caller's inputs, to verify with.
        seed: for verification inputs that are made.
        verify: check the slim graph against the masked dense one.
        inplace: let the dense model's tensors go as the slim ones are made; the model becomes the slim one.
        asked: ratios asked for, for the report.
        compensate: adjusts what stays before the rest goes; the slim graph is then checked against the graph that it
            left, masked.

    Raises:
        VerificationError: slim and masked outputs differ.
    """
    dense, model = traced.graph_module, traced.model
    state = state_of(dense)
    before = count_parameters(dense), count_macs(dense)
    check = verify and _can_run(dense, state)
    state.probe = make_probe(dense, example_inputs, seed)
    names = names_by_identity(model)
    by_name = {name: names.get(id(tensor), ()) for name, tensor in weights(dense)}
    shape = meta_twin(model) if inplace else model
    if compensate is not None:
        dense = dense if inplace else fork(dense)
        Pipeline([compensate])(dense)
    if check:
        Pipeline([load_pass("record-expected")])(dense)
    work = dense if inplace else fork(dense)
    slim = Pipeline(_passes(model, dense, check, inplace))(work).graph_module
    emission = _emit(shape, model, slim, by_name, inplace) if is_hugging_face(model) else Emission(None, (_NOT_ONE,))
    report = _report(slim, before, emission, asked or {})
    plan = state.plan
    assert plan is not None
    return Result(slim, _become(model, emission.model) if inplace else emission.model, plan, report)


_NOT_ONE = "the model passed is not a Hugging Face model"


def _passes(model: nn.Module, dense: fx.GraphModule, check: bool, inplace: bool) -> list[Pass]:
    steps = [
        load_pass("bypass-blocks"),
        load_pass("eliminate-dead-code"),
        load_pass("slice-parameters", copy=not inplace, mirror=model if inplace else None),
        load_pass("rewrite-literals"),
        load_pass("propagate-shapes"),
        load_pass("eliminate-dead-code"),
    ]
    if check:
        steps.append(load_pass("verify-removal", dense=None if inplace else dense))
    return steps


def _can_run(graph_module: fx.GraphModule, state: State) -> bool:
    if any(tensor.is_meta for _, tensor in weights(graph_module)):
        state.notes = (*state.notes, "not verified: the weights are on meta")
        return False
    return True


def _emit(
    shape: nn.Module,
    model: nn.Module,
    slim: fx.GraphModule,
    by_name: Mapping[str, tuple[str, ...]],
    inplace: bool,
) -> Emission:
    """The slim Hugging Face model, holding the tensors of the slim graph."""
    state = state_of(slim)
    plan, probe = state.plan, state.probe
    assert plan is not None and probe is not None
    tensors = {name: tensor for own, tensor in weights(slim) for name in by_name[own]}
    gone = tuple(f"{block}." for block in plan.removed_blocks)
    for named in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in named:
            if name not in tensors and not (gone and name.startswith(gone)):
                tensors[name] = tensor if inplace else _copy(tensor)

    def agrees(candidate: nn.Module) -> bool:
        if any(tensor.is_meta for tensor in tensors.values()):
            return True
        with torch.no_grad():
            want, got = output_tensors(slim(**probe)), output_tensors(candidate(**probe, use_cache=False))
        return _agree(want[0], got[0])

    return emit(shape, tensors, plan.removed_blocks, agrees, _numbered(slim))  # type: ignore[arg-type]


def _agree(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether two outputs are equal but for rounding.

    In half precision that is asked of half of the tokens: a router that rounds otherwise may send single ones to others
    of its experts.
    """
    if want.shape != got.shape or want.dtype in (torch.float32, torch.float64):
        return compare([want.float()], [got.float()]) <= 1e-4
    apart = (want.float() - got.float()).abs().amax(dim=-1).median()
    return bool(apart <= 2e-2 * max(1.0, float(want.abs().max())))


def _numbered(slim: fx.GraphModule) -> dict[str, dict[int, list[int]]]:
    """Units that stay of the tables the model's code makes by number: by block that reads one (else empty), by size."""
    state = state_of(slim)
    assert state.graph is not None and state.keep is not None
    found: dict[str, dict[int, list[int]]] = {}
    kept_of = kept_of_constants(axis_map(state.graph), state.keep)
    for node in slim.graph.nodes:
        if node.op != "get_attr" or node.target not in state.constants:
            continue
        stack = node.meta.get("nn_module_stack") or {}
        block = next((path for path, _ in stack.values() if path in state.blocks), "")
        for axis, kept in kept_of.get(str(node.target), {}).items():
            found.setdefault(block, {})[state.graph.nodes[Axis(str(node.target), axis)]["size"]] = kept
    return found


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _become(model: nn.Module, slim: nn.Module | None) -> nn.Module | None:
    """Turn the dense model the caller holds into the slim one, where there is one."""
    if slim is None:
        return None
    model.__dict__.clear()
    model.__dict__.update(slim.__dict__)
    return model


def _report(
    slim: fx.GraphModule, before: tuple[int, int], emission: Emission, asked: Mapping[str, float | None]
) -> Report:
    state = state_of(slim)
    assert state.graph is not None and state.keep is not None and state.plan is not None
    return Report(
        parameters=(before[0], count_parameters(slim)),
        macs=(before[1], count_macs(slim)),
        tokens=TOKENS,
        ratio=asked.get("ratio"),
        group_ratio=asked.get("group_ratio"),
        widths=widths_of(state.groups, state.keep),
        removed_blocks=state.plan.removed_blocks,
        frozen=frozen_reasons(state.graph),
        verification_error=state.error,
        model_reasons=() if emission.model is not None else emission.reasons,
        notes=state.notes,
    )
