"""The check that matters for a rule: what it lets go can go, and the rest computes what zeroing would."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import fx, nn

from fxprune.axes import Keep, render
from fxprune.discovery.dependency import AxisMap, Dependencies
from fxprune.discovery.explain import frozen_axes
from fxprune.discovery.groups import Group, Groups
from fxprune.graph.facts import facts_of, fork
from fxprune.graph.tensors import computed_tensors
from fxprune.masking.compare import TOLERANCE, compare, masked_by_block, slim_outputs
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


def masked_outputs(dense: fx.GraphModule, removal: Removal, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The float outputs of a graph with the removed structures zeroed."""
    return masked_by_block(dense, removal, inputs, by_block=False)[0]


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


def leaving(group: Group, stay: int, seed: int, *, nested: bool = True) -> Keep:
    """A removal that leaves some random units of a group, others in each outer unit where each may choose its own."""
    assert group.factor is not None
    rng = np.random.default_rng(seed)
    rows = 1 if group.outer is None else group.outer.size
    units = np.stack([rng.permutation(np.arange(group.size) < stay) for _ in range(rows)])
    if group.outer is None or not nested:
        return Keep({group.factor: units[0]})
    return Keep({group.factor: units}, {group.factor: group.outer})


def together(removals: Sequence[Keep]) -> Keep:
    """Several removals at once."""
    units = {factor: mask for keep in removals for factor, mask in keep.units.items()}
    return Keep(units, {factor: around for keep in removals for factor, around in keep.outer.items()})


def one_gone(groups: Sequence[Group]) -> Keep:
    """One random unit of each group gone, another one in each outer unit where that is allowed."""
    cut = [group for group in groups if group.factor is not None]
    return together([leaving(group, group.size - 1, seed) for seed, group in enumerate(cut)])


def keeps(group: Group) -> Iterator[Keep]:
    """Random removals of one unit and of half of the units, by outer unit too where each may choose its own."""
    for gone in sorted({1, group.size // 2}):
        yield leaving(group, group.size - gone, 0, nested=False)
        if group.outer is not None:
            yield leaving(group, group.size - gone, 0)


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
                tensor, every = tensors[name], set(range(tensors[name].shape[axis]))
                if isinstance(kept[0], int):
                    tensor.index_fill_(axis, torch.tensor(sorted(every.difference(kept))), 0)
                    continue
                for place, row in zip(plan.kept[name].get(0, range(len(tensor))), kept, strict=True):
                    tensor[place].index_fill_(axis - 1, torch.tensor(sorted(every.difference(row))), 0)
    return twin


def plain_outputs(module: nn.Module, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """What the module itself computes."""
    with torch.no_grad():
        return output_tensors(module(**inputs))


def require_close(
    expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor], what: str, accepted: float = TOLERANCE
) -> None:
    """Fail with ``what`` if outputs differ by more than is accepted."""
    error = compare(expected, actual)
    assert error <= accepted, f"{what}: {error:.2e}"


def check_removal(
    module: nn.Module,
    dense: fx.GraphModule,
    keep: Keep,
    groups: Sequence[Group],
    several: Sequence[Inputs],
    accepted: float = TOLERANCE,
) -> tuple[torch.Tensor, ...]:
    """Remove units of groups and compare the slim graph with masking, and with zeroing by hand where that is the same.

    Args:
        module: what was traced.
        dense: its graph with its groups.
        keep: the units that stay.
        groups: the groups that lose units; zeroing is not the same where a statistic runs over one of them.
        several: inputs to compare on.
        accepted: the largest difference of outputs.

    Returns:
        What the slim graph computes for the first of the inputs.
    """
    what = ", ".join(f"{g.name} of {g.size} {[(m.name, m.axis) for m in g.members]}" for g in groups)
    axes, plan = axes_of(dense), plan_of(axes_of(dense), keep)
    members = [m for g in groups if g.factor is not None and keep.touches(g.factor) for m in g.members]
    own = {(m.name, m.axis) for m in members if m.name not in axes.constants}
    assert own <= {(name, axis) for name, by_axis in plan.kept.items() for axis in by_axis}, what
    read = keep_of(axes, groups_of(dense), Plan.from_json(plan.to_json()))
    assert plan_of(axes, read) == plan, f"the plan is not the same when read back: {what}"
    slim = slim_graph(dense, keep)
    sizes = [sum(parameter.numel() for parameter in graph.parameters()) for graph in (slim, dense)]
    assert sizes[0] < sizes[1] or not any(m.trained for m in members), what
    found = []
    for inputs in several:
        found.append(slim_outputs(slim, inputs))
        masked = masked_outputs(dense, removal_of(dense, keep), inputs)
        require_close(masked, found[-1], f"slim differs from masked: {what}", accepted)
        if not any(group.renormalised for group in groups):
            by_hand = plain_outputs(zeroed(module, plan), inputs)
            require_close(by_hand, found[-1], f"slim differs from zeroing by hand: {what}", accepted)
    return found[0]


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
    require_close(dense_outputs, slim_outputs(dense, inputs), "the graph is not the module")
    free = [group for group in groups_of(dense) if group.factor is not None and not group.renormalised]
    assert groups is None or sorted(group.size for group in free) == sorted(groups), frozen_axes(graph_of(dense))
    seen = [check_removal(module, dense, keep, [group], [inputs]) for group in free for keep in keeps(group)]
    changes = [compare(dense_outputs, got) for got in seen]
    assert not free or max(changes) > TOLERANCE, "the removals changed nothing, so the comparison says nothing"
    return dense


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
    require_close(before, slim_outputs(dense, inputs), "the graph is not the module")
    for kind, groups in found.items():
        several = [group for group in groups if group.size > 1]
        got = check_removal(module, dense, one_gone(several), several, [inputs])
        assert compare(before, got) > TOLERANCE, f"{kind}: the removals changed nothing"
    return dense
