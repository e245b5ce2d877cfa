"""The check that matters for a rule: what it lets go can go, and the rest computes what zeroing would."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import fx, nn

from fxprune.axes import Factor, Keep, render
from fxprune.discovery.dependency import AxisMap, Dependencies
from fxprune.discovery.explain import frozen_axes
from fxprune.discovery.groups import Group, Groups
from fxprune.graph.facts import facts_of, fork
from fxprune.graph.tensors import computed_tensors
from fxprune.masking.compare import TOLERANCE, compare, masked_outputs, slim_outputs
from fxprune.masking.masked_run import output_tensors
from fxprune.pipeline.registry import load_pass
from fxprune.removal.plan import Plan, keep_of, plan_of
from fxprune.removal.removal import Removal
from fxprune.trace import trace
from tests.models import all_tensors

Inputs = Mapping[str, torch.Tensor]


class Net(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, body: Callable[[Any, torch.Tensor], Any], **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


def discover(module: nn.Module, inputs: Inputs | None = None, norm: str = "sliced") -> fx.GraphModule:
    """The graph of `module` with its groups among the facts."""
    dense = trace(module.eval(), inputs).graph_module
    load_pass("find-groups", norm=norm)(dense)
    return dense


def graph_of(dense: fx.GraphModule) -> nx.Graph:
    """The dependency graph of a graph that went through `discover`."""
    return facts_of(dense)[Dependencies].graph


def axes_of(dense: fx.GraphModule) -> AxisMap:
    """The solved axes of a graph that went through `discover`."""
    return facts_of(dense)[Dependencies].axes


def groups_of(dense: fx.GraphModule) -> tuple[Group, ...]:
    """The groups of a graph that went through `discover`."""
    return facts_of(dense)[Groups].all


def removal_of(dense: fx.GraphModule, keep: Keep | None = None, blocks: tuple[str, ...] = ()) -> Removal:
    """The removal of units and blocks; without arguments of none."""
    return Removal(axes_of(dense), groups_of(dense), keep or Keep(), blocks)


def decide(dense: fx.GraphModule, keep: Keep | None = None, blocks: tuple[str, ...] = ()) -> Removal:
    """Put such a removal among the facts."""
    facts_of(dense).put(removal_of(dense, keep, blocks))
    return facts_of(dense)[Removal]


def shape_of(dense: fx.GraphModule, name: str) -> list[str]:
    """The axes of a tensor as text, factors named a, b, .. in order of appearance."""
    letters: dict[int, str] = {}
    text = [render(expr) for expr in axes_of(dense).tensors[name]]

    def letter(match: re.Match[str]) -> str:
        return letters.setdefault(int(match[1]), "abcdefghijklmnopqrstuvwxyz"[len(letters)])

    return [re.sub(r"f(\d+)", letter, axis) for axis in text]


def keeps(group: Group, seed: int = 0) -> Iterator[Keep]:
    """Random removals of one unit and of half of the units, by outer unit too where each may choose its own."""
    assert group.factor is not None
    rng = np.random.default_rng(seed)
    for gone in sorted({1, group.size // 2}):
        units = np.ones(group.size, dtype=bool)
        units[rng.choice(group.size, gone, replace=False)] = False
        yield Keep({group.factor: units})
        if group.outer is not None:
            rows = np.stack([rng.permutation(units) for _ in range(group.outer.size)])
            yield Keep({group.factor: rows}, {group.factor: group.outer})


def slim_graph(dense: fx.GraphModule, keep: Keep, blocks: tuple[str, ...] = ()) -> fx.GraphModule:
    """A graph without what `keep` and `blocks` take away; the dense one stays as it is."""
    work = fork(dense)
    decide(work, keep, blocks)
    return load_pass("shrink")(work, inplace=True).graph_module


def copy_of(module: nn.Module) -> nn.Module:
    """A copy; torch refuses to copy what a module computed with gradients and keeps."""
    return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in computed_tensors(module)})


def zeroed(module: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `module` with the slices that `plan` removes set to zero by hand; parameters that are one stay one."""
    twin = copy_of(module)
    tensors = all_tensors(twin)
    with torch.no_grad():
        for name in set(plan.kept) & set(tensors):
            for axis, kept in plan.kept[name].items():
                gone = sorted(set(range(tensors[name].shape[axis])) - set(kept))
                tensors[name].index_fill_(axis, torch.tensor(gone), 0)
    return twin


def plain_outputs(module: nn.Module, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """What the module itself computes."""
    with torch.no_grad():
        return output_tensors(module(**inputs))


def check_removes_exactly(
    module: nn.Module, inputs: Inputs, groups: Sequence[int] | None = None, norm: str = "sliced"
) -> fx.GraphModule:
    """Remove units of every group in turn and compare the slim graph with masking and with zeroing by hand.

    Args:
        module: what to prune.
        inputs: keyword inputs of its forward.
        groups: the sizes the groups that are not renormalised must have; None where that is not the point.
        norm: what becomes of norms over units that go.

    Returns:
        The dense graph, for further questions.
    """
    dense = discover(module, inputs, norm)
    dense_outputs = plain_outputs(module, inputs)
    assert compare(dense_outputs, slim_outputs(dense, inputs)) <= TOLERANCE, "the graph is not the module"
    free = [group for group in groups_of(dense) if group.factor is not None and not group.renormalised]
    assert groups is None or sorted(group.size for group in free) == sorted(groups), frozen_axes(graph_of(dense))
    seen = [_check(module, dense, group, keep, inputs) for group in free for keep in keeps(group)]
    changes = [compare(dense_outputs, got) for got in seen]
    assert not free or max(changes) > TOLERANCE, "the removals changed nothing, so the comparison says nothing"
    return dense


def _check(
    module: nn.Module, dense: fx.GraphModule, group: Group, keep: Keep, inputs: Inputs
) -> tuple[torch.Tensor, ...]:
    plan = plan_of(axes_of(dense), keep)
    own = {(m.name, m.axis) for m in group.members if m.name not in axes_of(dense).constants}
    assert own <= {(n, i) for n, by_axis in plan.kept.items() for i in by_axis}
    read_back = keep_of(axes_of(dense), groups_of(dense), Plan.from_json(plan.to_json()))
    assert plan_of(axes_of(dense), read_back) == plan, f"{group.name}: the plan is not the same when read back"
    slim = slim_graph(dense, keep)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in dense.parameters()), group.name
    got = slim_outputs(slim, inputs)
    masked = masked_outputs(dense, removal_of(dense, keep), inputs)
    by_hand = plain_outputs(zeroed(module, plan), inputs)
    assert compare(masked, got) <= TOLERANCE, f"{group.name}: slim differs from masked"
    assert compare(by_hand, got) <= TOLERANCE, f"{group.name}: slim differs from zeroing by hand"
    return got


def check_kinds_remove_exactly(module: nn.Module, inputs: Inputs, kinds: Mapping[str, Sequence[int]]) -> fx.GraphModule:
    """Remove a unit of every group of a kind at once, and compare the slim graph with masking and zeroing by hand.

    Args:
        module: what to prune.
        inputs: keyword inputs of its forward.
        kinds: for each kind the sizes that its groups must have; the name of a kind ends in ``~`` for those that a
            statistic runs over, which zeroing by hand does not equal.

    Returns:
        The dense graph, for further questions.
    """
    dense = discover(module, inputs)
    found: dict[str, list[Group]] = {}
    for group in groups_of(dense):
        if group.factor is not None:
            found.setdefault(group.kind + "~" * bool(group.renormalised), []).append(group)
    sizes = {kind: sorted(group.size for group in groups) for kind, groups in found.items()}
    assert sizes == {kind: sorted(size) for kind, size in kinds.items()}, frozen_axes(graph_of(dense))
    before = plain_outputs(module, inputs)
    assert compare(before, slim_outputs(dense, inputs)) <= TOLERANCE, "the graph is not the module"
    for kind, groups in found.items():
        keep = _keep_of_all([group for group in groups if group.size > 1])
        got = slim_outputs(slim_graph(dense, keep), inputs)
        assert compare(masked_outputs(dense, removal_of(dense, keep), inputs), got) <= TOLERANCE, f"{kind}: not masked"
        if not kind.endswith("~"):
            by_hand = plain_outputs(zeroed(module, plan_of(axes_of(dense), keep)), inputs)
            assert compare(by_hand, got) <= TOLERANCE, f"{kind}: slim differs from zeroing by hand"
        assert compare(before, got) > TOLERANCE, f"{kind}: the removals changed nothing"
    return dense


def _keep_of_all(groups: Sequence[Group]) -> Keep:
    """One unit of each group gone, another one in each outer unit where that is allowed."""
    units: dict[Factor, Any] = {}
    outer: dict[Factor, Factor] = {}
    for seed, group in enumerate(groups):
        *_, last = [keep for keep in keeps(group, seed) if keep.count(group.factor) == group.size - 1]  # type: ignore[arg-type]
        units |= last.units
        outer |= last.outer
    return Keep(units, outer)
