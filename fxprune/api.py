"""The face of the package: prune a model, or apply a plan to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fxprune.calibration import read_calibration
from fxprune.dependency import axis_map
from fxprune.errors import UnknownNameError
from fxprune.passbase import Pass
from fxprune.pipeline import Pipeline
from fxprune.plan import Plan, keep_of
from fxprune.registry import load_pass, pass_names
from fxprune.shrinking import Result, shrink
from fxprune.state import Track, state_of
from fxprune.stock import make_stock_test
from fxprune.trace import trace
from fxprune.trace.inputs import is_hugging_face

__all__ = ["Result", "apply", "prune"]


def prune(
    model: nn.Module,
    calibration: Any = None,
    *,
    ratio: float = 0.2,
    kinds: Sequence[str] = ("mlp", "head"),
    importance: str | Pass = "taylor",
    taylor: str = "mix",
    reduction: str = "sum",
    ranking: str = "local",
    group_ratio: float | None = None,
    protect: tuple[int, int] | tuple[()] | None = None,
    round_to: int = 1,
    uniform: bool = False,
    compensate: str | Pass | None = None,
    seed: int = 0,
    verify: bool = True,
    inplace: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
    track: Track | None = None,
) -> Result:
    """Remove the least important structures of ``model``; the model passed is not changed.

    Args:
        model: a Hugging Face model, or any module that ``torch.export`` can trace.
        calibration: token ids ``(samples, tokens)``, a list of tokenised dicts, a DataLoader, or None for criteria
            that need no data.
        ratio: fraction of the parameters that goes, in [0, 1); reached within half a percentage point.
        kinds: which structures may go: ``mlp``, ``head``, ``channel``, ``head_dim``, ``expert``, ``layer``.
        importance: ``taylor``, ``l1``, ``l2``, ``random``, another registered importance pass, or a pass.
        taylor: ``vector``, ``first``, ``second`` or ``mix``.
        reduction: how members of a group are combined: ``sum``, ``prod``, ``max``, ``mean``, ``first``, ``last``.
        ranking: ``local``: the same fraction in every group; ``global``: the lowest scores anywhere.
        group_ratio: the paper's ratio, a fraction of the units of every group; takes the place of ``ratio``.
        protect: how many layers stay whole at the front and at the end; None for the paper's 4 and 2 of 32, scaled
            to the depth; ``()`` for none.
        round_to: slim widths are multiples of this.
        uniform: the same widths in every layer, and such that the model's own config class takes them: the checkpoint
            then loads in stock transformers, and in whatever reads its format. ``protect`` must be empty or None.
        compensate: ``least-squares``: weights that lost inputs are fitted to what the dense model computes on the
            calibration data; or a pass. None leaves every kept number as it is.
        seed: for ``random`` importance and the verification inputs.
        verify: check that masking equals shrinking, and that the emitted model equals the graph.
        inplace: free each dense tensor as its slim one is made; ``model`` then *becomes* the slim model.
        example_inputs: keyword inputs for modules that are not Hugging Face models.
        track: shows progress, as ``track(items, what, total)``.

    Raises:
        FxpruneError: one of its subclasses, naming what is wrong and what to do; the model is then unchanged.
    """
    compensation = _compensation(compensate, inplace)
    estimate = _importance_pass(importance, taylor, tuple(kinds), reduction, seed, 0.1 if inplace else 0.6)
    common = {"kinds": tuple(kinds), "ranking": ranking, "protect": protect, "round_to": round_to, "uniform": uniform}
    select = _select_pass(ratio, group_ratio, common)
    traced = trace(model, example_inputs)
    state = state_of(traced.graph_module)
    if uniform and is_hugging_face(model):
        state.accepts = make_stock_test(traced)
    if track is not None:
        state.track = track
    if calibration is not None:
        state.calibration = read_calibration(calibration, traced.graph_module)
    Pipeline([load_pass("find-groups"), estimate, select])(traced.graph_module)
    asked = {"ratio": ratio if group_ratio is None else None, "group_ratio": group_ratio}
    return shrink(
        traced, example_inputs, seed=seed, verify=verify, inplace=inplace, asked=asked, compensate=compensation
    )


def apply(
    model: nn.Module,
    plan: Plan,
    calibration: Any = None,
    *,
    compensate: str | Pass | None = None,
    verify: bool = True,
    inplace: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
) -> Result:
    """Remove from ``model`` what ``plan`` says.

    Args:
        model: the model the plan was made for, or one of the same shape.
        plan: from an earlier result or :meth:`Plan.from_json`.
        calibration: as for :func:`prune`; for ``compensate`` alone.
        compensate: as for :func:`prune`.
        verify: as for :func:`prune`.
        inplace: as for :func:`prune`.
        example_inputs: as for :func:`prune`.

    Raises:
        PlanError: the plan does not fit the model.
    """
    compensation = _compensation(compensate, inplace)
    traced = trace(model, example_inputs)
    state = state_of(traced.graph_module)
    if calibration is not None:
        state.calibration = read_calibration(calibration, traced.graph_module)
    Pipeline([load_pass("find-groups")])(traced.graph_module)
    assert state.graph is not None
    state.keep = keep_of(axis_map(state.graph), state.groups, plan)
    state.plan = plan
    return shrink(traced, example_inputs, verify=verify, inplace=inplace, compensate=compensation)


def _importance_pass(
    importance: str | Pass, taylor: str, kinds: tuple[str, ...], reduction: str, seed: int, memory: float
) -> Pass:
    own: dict[str, dict[str, Any]] = {"random": {"seed": seed}, "taylor": {"order": taylor, "memory": memory}}
    more = own.get(importance, {}) if isinstance(importance, str) else {}
    return _chosen(importance, "importance", "importance", kinds=kinds, reduction=reduction, **more)


def _compensation(compensate: str | Pass | None, inplace: bool) -> Pass | None:
    return None if compensate is None else _chosen(compensate, "compensate", "compensation", inplace=inplace)


def _chosen(choice: str | Pass, stage: str, what: str, **arguments: Any) -> Pass:
    """The pass itself, or the one of ``stage`` by that name, made with ``arguments``."""
    if isinstance(choice, Pass):
        return choice
    known = pass_names(stage)
    if choice not in known:
        raise UnknownNameError(what, choice, known)
    return load_pass(choice, **arguments)


def _select_pass(ratio: float, group_ratio: float | None, common: Mapping[str, Any]) -> Pass:
    if group_ratio is None:
        return load_pass("select-by-ratio", ratio=ratio, **common)
    return load_pass("select-by-group-ratio", group_ratio=group_ratio, **common)
