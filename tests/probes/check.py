"""What must hold of every probe: each graph computes what its module does, or refuses and says why."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import fx, nn

import fxprune
from fxprune.errors import FxpruneError
from fxprune.graph.compat import tree_leaves
from fxprune.graph.facts import facts_of, fork, unshare
from fxprune.graph.tensors import map_tensors, tensors_of
from fxprune.masking.compare import compare
from fxprune.pipeline.registry import load_pass
from fxprune.trace.fidelity import Fidelity, tolerance
from tests.oracle import Net, copy_of, groups_of, keeps, removal_of, slim_graph, zeroed

Inputs = Mapping[str, Any]
Middle = Callable[[Any, torch.Tensor], Any]

WIDTH = 6


class Between(Net):
    """Two linear layers with something between them; units of the first may go where all else allows it."""

    def __init__(self, middle: Middle, out: int = WIDTH, **parts: Any) -> None:
        torch.manual_seed(0)
        ends = {"a": nn.Linear(4, WIDTH), "b": nn.Linear(out, 3)}
        super().__init__(lambda m, x: m.b(middle(m, m.a(x))), **ends, **parts)


def numbers(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)


def outcome(
    module: nn.Module, inputs: Inputs, others: Sequence[Inputs] = (), every: bool = False, dynamic: bool = True
) -> str:
    """Return ``exact``, ``frozen`` if nothing could go, or the refusal of the module or of an input.

    Args:
        module: the probe.
        inputs: what it is traced with.
        others: inputs that the graph has to compute as the module does, or has to refuse.
        every: whether to remove half of the units of each group too, and others in each outer unit.
        dynamic: as for :func:`fxprune.trace`.

    Raises:
        AssertionError: something is silently wrong.
    """
    before = state_of(module), map_tensors(inputs, torch.clone)
    try:
        dense = fxprune.trace(module, inputs, dynamic=dynamic).graph_module
        refusals = [line for at in (inputs, *others) if (line := same(module, dense, at))]
        check_gradients(module, dense, inputs)
        load_pass("find-groups")(dense, inplace=True)
        pairs = [] if is_random(module, inputs) else list(removals(module, dense, every))
        refusals += [line for slim, masked in pairs for at in (inputs, *others) if (line := same(masked, slim, at))]
        gone = len(pairs)
    except FxpruneError as error:
        assert error.what and "\n" not in error.what, error
        refusals = [str(error)]
        gone = 0
    finally:
        assert equal((state_of(module), inputs), before), "the module or its inputs changed"
    return refusals[0] if refusals else "exact" if gone else "frozen"


def removals(
    module: nn.Module, dense: fx.GraphModule, every: bool = False
) -> Iterator[tuple[fx.GraphModule, nn.Module]]:
    """Yield slim graphs, each with the module in which what went is zeroed by hand."""
    for group in groups_of(dense):
        if group.factor is None or group.renormalised:
            continue
        for keep in islice(keeps(group), None if every else 1):
            yield slim_graph(dense, keep), zeroed(module, removal_of(dense, keep).plan)


def same(module: nn.Module, graph_module: fx.GraphModule, inputs: Inputs) -> str:
    """Compare both on ``inputs``; return the refusal of the graph, or nothing if all is well."""
    wanted = run(copy_of(module).eval(), inputs)
    twin = fork(graph_module)
    unshare(twin, graph_module)
    got = run(twin, inputs)
    if isinstance(got, Exception):
        return "" if isinstance(wanted, Exception) else str(got).split("\n")[0]
    assert not isinstance(wanted, Exception), f"the module refuses what its graph computes: {wanted}"
    assert [value.dtype for value in wanted] == [value.dtype for value in got]
    assert [value.shape for value in wanted] == [value.shape for value in got]
    accepted = max(tolerance(parameter.dtype) for parameter in module.parameters())
    assert compare(tuple(v.double() for v in wanted), tuple(v.double() for v in got)) <= 2 * accepted
    return ""


def is_random(module: nn.Module, inputs: Inputs) -> bool:
    """Whether a module draws random numbers, of which a slim one draws fewer."""
    found = [run(copy_of(module).eval(), inputs, seed) for seed in (0, 1)]
    return not equal(*found)


def run(module: nn.Module, inputs: Inputs, seed: int = 0) -> Sequence[torch.Tensor] | Exception:
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            return tensors_of(module(**map_tensors(inputs, torch.clone)))
    except Exception as error:  # whatever code of a probe raises
        return error


def check_gradients(module: nn.Module, dense: fx.GraphModule, inputs: Inputs) -> None:
    """Gradients of the graph are those of the module, or it is known which are not."""
    apart = facts_of(dense)[Fidelity].unlike
    twin = copy_of(module).eval()
    wanted = gradients(twin, twin, inputs)
    held = [*module.named_parameters(), *module.named_buffers()]
    before = [tensor.detach().clone() for _, tensor in held]
    got = gradients(dense, module, inputs)
    with torch.no_grad():  # the graph writes to them as the module does
        for (_, tensor), value in zip(held, before, strict=True):
            tensor.copy_(value)
    for name in wanted.keys() - set(apart):
        scale = wanted[name].norm().clamp_min(1e-12)
        assert (wanted[name] - got[name]).norm() / scale <= 1e-3 if wanted[name].any() else not got[name].any(), name
    for parameter in module.parameters():
        parameter.grad = None


def gradients(computes: nn.Module, owns: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Return the gradient of each parameter of ``owns`` when ``computes`` runs; zeros where there is none."""
    with torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = tensors_of(computes(**map_tensors(inputs, torch.clone)))
        parts = [(value.float() * numbers(*value.shape)).sum() for value in outputs if value.requires_grad]
        if parts:
            torch.stack(parts).sum().backward()
    found = {name: parameter.grad for name, parameter in owns.named_parameters()}
    return {
        name: torch.zeros_like(owns.get_parameter(name)) if gradient is None else gradient.clone()
        for name, gradient in found.items()
    }


def state_of(module: nn.Module) -> Any:
    """Return all that a run could change of a module: tensors, modes, and plain attributes."""
    tensors = {name: value.detach().clone() for name, value in module.state_dict(keep_vars=True).items()}
    plain = {
        f"{path}.{name}": value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str | list | torch.Tensor)
    }
    return tensors, plain


def equal(a: Any, b: Any) -> bool:
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x is y or x == y for x, y in pairs)


def pruned(module: nn.Module, inputs: Inputs, others: Sequence[Inputs] = (), **options: Any) -> str:
    """Prune structures of every kind by the public pipeline, with its verification.

    Those whose removal is exact go, and what is left is compared with the module in which they are zeroed by hand: at
    ``others`` too, if there are any.

    Returns:
        The kinds of which something went, or the refusal of the module.
    """
    before = state_of(module), map_tensors(inputs, torch.clone)
    try:
        dense = fxprune.trace(module, inputs, dynamic=bool(others)).graph_module
        load_pass("find-groups", norm="masked")(dense, inplace=True)
        free = [group for group in groups_of(dense) if group.factor is not None and not group.renormalised]
        kinds = sorted({group.kind for group in free if group.size > 1})
        if not kinds:
            return "frozen"
        given = {"importance": "random", "protect": (), "norm": "masked", "compensate": "none", "tune": "none"}
        given |= {"ratio": {f"exact-{kind}": 0.3 for kind in kinds}}
        result = fxprune.Result.of(fxprune.prune_pipeline(**{**given, **options})(dense).graph_module)
        assert not result.report.renormalised
        for at in (inputs, *others):
            same(zeroed(module, result.plan), result.graph_module, at)
    except FxpruneError as error:
        assert error.what and "\n" not in error.what, error
        return str(error)
    finally:
        assert equal((state_of(module), inputs), before), "the module or its inputs changed"
    went = {(member.name, member.axis) for group in free for member in group.members}
    assert {(name, axis) for name, axes in result.plan.kept.items() for axis in axes} <= went
    gone = [g.kind for g in free if any(m.axis in result.plan.kept.get(m.name, ()) for m in g.members)]
    return ", ".join(sorted(set(gone)))
