"""Every registered rule against its op: free units can be removed, and statements about zeros hold."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fxprune.axes import Expr, Factor, Keep, factors, kept_mask, kept_size
from fxprune.discovery.dependency import resolve_experts
from fxprune.discovery.zeros import ZeroWalk
from fxprune.graph.compat import tree_leaves
from fxprune.graph.tensors import with_argument
from fxprune.rules.statements import Axis
from tests.rules.page import PAGE, page
from tests.rules.samples import Applied, Sample, Tensors, samples

SAMPLES = samples()
CASES = [(name, i) for name, found in SAMPLES.items() for i in range(len(found))]


class Trial(Applied):
    """A sample whose axes are solved."""

    def __init__(self, sample: Sample) -> None:
        super().__init__(sample)
        self.least = resolve_experts(self.stated)
        solver = self.stated.solver
        made = itertools.chain.from_iterable(self.stated.tensors.values())
        self.axes = {x.name: tuple(solver.resolve(axis) for axis in x.axes) for x in made}
        self.frozen = solver.frozen_factors()
        self.statistics = {f for s in self.stated.statistics for f in factors(solver.resolve(s.expr))}
        self.positions = {name: solver.resolve(found.expr) for name, found in self.stated.positions.items()}

    def run(self, inputs: Tensors, keep: Keep | None = None) -> Tensors:
        """The results of the op for `inputs`, with its size arguments after the removal of `keep`."""
        arguments: Any = (self.node.args, self.node.kwargs)
        for size in self.stated.size_arguments if keep else ():
            number = kept_size(self.stated.solver.resolve(size.expr), keep or Keep()) + size.offset
            arguments = with_argument(arguments, size.path, number)
        leaves = [leaf for leaf in tree_leaves(self.value(inputs, *arguments)) if isinstance(leaf, torch.Tensor)]
        return dict(zip([x.name for x in self.site.outs], leaves, strict=False))

    def free(self) -> Iterator[Factor]:
        """The factors that may lose a unit."""
        found = dict.fromkeys(f for exprs in self.axes.values() for expr in exprs for f in factors(expr))
        return (f for f in found if f not in self.frozen and self.least.get(f, 1) < f.size)


def without(size: int, unit: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    mask = np.ones(size, dtype=bool)
    mask[unit] = False
    return mask


def kept_index(expr: Expr, keep: Keep) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(kept_mask(expr, keep)))


def avoid(trial: Trial, keep: Keep) -> Tensors:
    """The inputs; positions of units that go are those of one that stays, since they are never picked."""
    found = dict(trial.inputs)
    for name, expr in trial.positions.items():
        if name in found:
            mask = torch.from_numpy(kept_mask(expr, keep).copy())
            found[name] = torch.where(mask[found[name]], found[name], kept_index(expr, keep)[0])
    return found


def masked(trial: Trial, inputs: Tensors, keep: Keep, but: str = "") -> Tensors:
    """`inputs` with zeros at the units that go, that named `but` as it is."""
    found = dict(inputs)
    for name, value in inputs.items():
        for dim, expr in enumerate(trial.axes[name] if name != but else ()):
            mask = torch.from_numpy(kept_mask(expr, keep).copy()).view(-1, *[1] * (value.dim() - dim - 1))
            value = value * mask.to(value.dtype)
        found[name] = value
    return found


def cut(trial: Trial, values: Tensors, keep: Keep) -> Tensors:
    """`values` without the units that go; positions are those among the units that stay."""
    found = {}
    for name, value in values.items():
        if name in trial.positions:
            value = torch.searchsorted(kept_index(trial.positions[name], keep), value.contiguous())
        for dim, expr in enumerate(trial.axes[name]):
            value = value.index_select(dim, kept_index(expr, keep))
        found[name] = value
    return found


def check_removal(trial: Trial, factor: Factor, unit: int) -> None:
    """The op on what is left gives what is left of the op on what is masked."""
    keep = Keep({factor: without(factor.size, unit)})
    inputs = avoid(trial, keep)
    small = trial.run(cut(trial, inputs, keep), keep)
    zeroed = trial.run(masked(trial, inputs, keep))
    if factor in trial.statistics:  # what is taken over fewer units is another number
        assert {name: x.shape for name, x in small.items()} == {
            name: torch.Size(kept_size(expr, keep) for expr in trial.axes[name]) for name in small
        }
        return
    for name, expected in cut(trial, zeroed, keep).items():
        torch.testing.assert_close(small[name], expected, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def check_zeros(trial: Trial, factor: Factor, unit: int, unmasked: str = "") -> None:
    """Masked units hold what discovery says they do, all inputs masked or all but one."""
    walk = ZeroWalk(trial.graph, trial.stated, trial.axes, [unmasked] if unmasked else [])
    walk.visit(trial.node)
    if trial.node.name in walk.renormalised.get(factor, {}):
        return
    keep = Keep({factor: without(factor.size, unit)})
    results = trial.run(masked(trial, avoid(trial, keep), keep, unmasked))
    for name, value in results.items():
        for dim, expr in enumerate(trial.axes[name]):
            numbers = walk.numbers(Axis(name, dim), factor)
            if factor not in factors(expr) or None in numbers:
                continue
            gone = value.index_select(dim, torch.from_numpy(np.flatnonzero(~kept_mask(expr, keep))))
            close = [
                torch.isclose(gone, torch.tensor(number).to(gone.dtype)) for number in numbers if number is not None
            ]
            assert bool(torch.stack(close).any(0).all()), f"{name}[{dim}] is not {set(numbers)}: {gone.flatten()[:8]}"


def test_every_op_with_a_rule_has_a_sample() -> None:
    there = [name for name in SAMPLES if name.startswith("python") or hasattr(torch.ops.aten, name[6:].split(".")[0])]
    assert [name for name in there if not SAMPLES[name]] == []


@pytest.mark.parametrize(("name", "i"), CASES, ids=[f"{name.split('::')[1]}-{i}" for name, i in CASES])
def test_what_a_rule_lets_go_can_go(name: str, i: int) -> None:
    trial = Trial(SAMPLES[name][i])
    assert trial.stated.unruled == {}
    first, again = trial.run(trial.inputs), trial.run(trial.inputs)
    drawn = "empty" in name or any(not torch.equal(first[n].nan_to_num(), again[n].nan_to_num()) for n in first)
    for factor in trial.free():
        for unit in {0, factor.size - 1} if not drawn else ():
            check_removal(trial, factor, unit)
            for unmasked in ("", *(n for n in trial.inputs if n.startswith("t"))):
                check_zeros(trial, factor, unit, unmasked)


def test_the_page_of_all_rules_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python -m tests.rules.page writes it"
