"""A graph cut into parts that run one after the other for all samples."""

import itertools
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.data.calibration import Sample
from fxprune.errors import CalibrationError
from fxprune.graph.tensors import weights
from fxprune.masking.masked_run import output_tensors
from fxprune.masking.parts import Part, PartRuns, cut_graph, observe_nodes, output_numel, part_bytes, parts_by_weights
from fxprune.offload.files import offload_to
from fxprune.offload.prefetch import Prefetcher, offer_prefetcher, use_prefetcher
from fxprune.pipeline.registry import load_pass
from tests.models import token_ids
from tests.oracle import Net, discover
from tests.remembered import grouped, traced


def calibrate(dense: torch.fx.GraphModule, data: torch.Tensor) -> None:
    load_pass("calibrate", data=data)(dense)


def costs(graph_module: torch.fx.GraphModule) -> dict[str, float]:
    return {name: float(tensor.numel()) for name, tensor in weights(graph_module)}


def parts_of(family: str, share: float, **changes: int) -> tuple[torch.fx.GraphModule, list[Part]]:
    dense = traced(family, **changes)
    cost = costs(dense)
    return dense, cut_graph(dense.graph, cost, share * sum(cost.values()))


@pytest.mark.parametrize("share", [1.0, 0.3, 0.1, 1e-9])
def test_every_op_is_in_one_part_and_parts_are_no_larger_than_allowed(share: float) -> None:
    dense, parts = parts_of("llama", share)
    ops = [node for part in parts for node in part.nodes if node.op != "get_attr"]
    assert ops == [node for node in dense.graph.nodes if node.op not in ("get_attr", "placeholder")]
    cost = costs(dense)
    for part in parts:
        readers = {user for node in part.nodes if node.op == "get_attr" for user in node.users if user in part.nodes}
        one = len(readers) == 1 or len(set(part.reads)) == 1
        assert sum(cost[name] for name in part.reads) <= share * sum(cost.values()) or one
    assert (len(parts) == 1) == (share == 1.0)


@pytest.mark.parametrize("share", [0.3, 0.1, 1e-9])
def test_no_cut_is_between_readers_of_a_weight_of_one_block(share: float) -> None:
    """Both parts need it; a weight that is tied over the whole model hinders no cut."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in net.layers:
            x = layer[1](layer[0](layer[1](layer[0](x).relu())).relu())
        return net.head(x @ net.head.weight)

    layers = nn.ModuleList(nn.ModuleList(nn.Linear(6, 6) for _ in range(2)) for _ in range(8))
    dense = discover(Net(forward, layers=layers, head=nn.Linear(6, 6)), {"x": torch.randn(2, 6)})
    cost = costs(dense)
    parts = cut_graph(dense.graph, cost, share * sum(cost.values()))
    reads = [{name for name in part.reads if name.startswith("layers")} for part in parts]
    assert len(parts) > 2 and all(one.isdisjoint(other) for one, other in itertools.combinations(reads, 2))


@pytest.mark.parametrize("buffer", [False, True])
def test_parts_compute_what_the_graph_computes_and_none_writes_to_what_another_keeps(buffer: bool) -> None:
    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.layers[0](x)
        z = net.layers[1](y)
        y.mul_(2)
        if buffer:
            net.seen.add_(1)
        return net.layers[3](net.layers[2](y + z) + net.seen)

    torch.manual_seed(0)
    model: Any = Net(body, layers=nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), seen=torch.zeros(8))
    dense = fxprune.trace(model, {"x": torch.randn(2, 8)}).graph_module
    parts = cut_graph(dense.graph, costs(dense), 1.0)
    assert (len(parts) == 1) == buffer
    x = torch.randn(2, 8)
    want = model(x.clone()).detach()
    model.seen.zero_()
    runs = PartRuns(dense, parts, [{"x": x}], ())
    for part in parts[:-1]:
        assert list(runs.forward(part)) == [0]
    got: list[torch.Tensor] = []
    end = torch.zeros((), requires_grad=True)
    list(runs.backward(parts[-1], lambda _: {}, lambda _, output: got.append(output_tensors(output)[0]) or end * 1))
    torch.testing.assert_close(got[0], want)


def test_parts_are_halved_while_free_memory_is_short_and_end_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = traced("llama", num_hidden_layers=24, intermediate_size=256)
    total = sum(tensor.nbytes for _, tensor in weights(dense))
    kept = {}
    for free, share in ((1.0, 0.1), (0.8, 0.1), (0.79, 0.05), (0.39, 0.05), (0.0, 0.05)):
        monkeypatch.setattr("fxprune.masking.parts.free_bytes", lambda _, free=free: free * total)
        assert part_bytes(dense) == pytest.approx(share * total)
        parts = parts_by_weights(dense)
        wanted = cut_graph(dense.graph, {name: 4 * cost for name, cost in costs(dense).items()}, share * total)
        assert [part.nodes for part in parts] == [part.nodes for part in wanted]
        kept[share] = len(parts), max(sum(map(output_numel, part.gives)) for part in parts)
    assert kept[0.05][0] > kept[0.1][0] and kept[0.05][1] <= 2 * kept[0.1][1]


class Watched(Prefetcher):
    """Prefetches by copies, and records which weights are there each time that one more is copied."""

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        super().__init__(torch.device("cpu"))
        self.names = {tensor.data_ptr(): name for name, tensor in weights(graph_module)}
        self.copies: list[tuple[str, weakref.ref[torch.Tensor]]] = []
        self.there: list[set[str]] = []

    def start_copy(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        moved = tensor.clone()
        self.copies.append((self.names[tensor.data_ptr()], weakref.ref(moved)))
        self.there.append({name for name, copy in self.copies if copy() is not None})
        return lambda: moved

    @property
    def order(self) -> list[str]:
        return [name for name, _ in self.copies]


def test_weights_of_one_part_are_there_and_those_of_the_next_on_their_way() -> None:
    dense, parts = parts_of("llama", 0.2, num_hidden_layers=4)
    prefetcher = Watched(dense)
    samples = [{"input_ids": row[None]} for row in token_ids(3)]
    with offer_prefetcher(prefetcher), use_prefetcher(True):
        runs = PartRuns(dense, parts, samples, ())
        for part in parts[:-1]:
            list(runs.forward(part))
        end = torch.zeros((), requires_grad=True)
        for part in reversed(parts):
            list(runs.backward(part, lambda _: {}, lambda _, output: end * output_tensors(output)[0].sum()))
        del runs
    read = [set(part.reads) for part in parts]
    forward = list(dict.fromkeys(name for part in parts for name in part.reads))
    assert prefetcher.order[: len(forward)] == forward, "in order of execution, each once for all samples"
    back = [name for i in reversed(range(len(parts) - 1)) for name in parts[i].reads if name not in read[i + 1]]
    assert prefetcher.order[len(forward) :] == back, "and the other way, except those that the part before left there"
    assert len(parts) > 3
    for there in prefetcher.there:
        assert any(there <= one | other for one, other in itertools.pairwise(read)), there
    assert all(copy() is None for _, copy in prefetcher.copies[:-1]), "and dropped in the end"


@pytest.mark.parametrize("forward_only", [True, False])
def test_a_forward_run_keeps_the_values_that_later_parts_take(forward_only: bool) -> None:
    dense, parts = parts_of("llama", 0.2, num_hidden_layers=4)
    ids = token_ids(1)
    outputs: list[Any] = []
    runs = PartRuns(dense, parts, [{"input_ids": ids}], (), forward_only=forward_only)
    for i, part in enumerate(parts):
        list(runs.forward(part, {dense.graph.output_node(): outputs.append}))
        later = {node for other in parts[i + 1 :] for node in other.takes}
        assert runs.values[0].keys() >= later & {
            node for other in parts[: i + 1] for node in (*other.takes, *other.gives)
        }
        assert runs.values[0].keys() <= later or not forward_only
    torch.testing.assert_close(output_tensors(outputs[0])[0], output_tensors(dense(ids))[0])


@pytest.mark.parametrize("order", ["vector", "first", "second", "mix"])
def test_scores_are_the_same_by_parts_on_disk_and_with_prefetched_weights(order: str, tmp_path: Path) -> None:
    """The tied weight, which several parts read, counts once."""
    found = []
    ways = [("fast", False, False), ("low", False, False), ("fast", True, True), ("low", True, True)]
    for memory, on_disk, used in ways:
        dense = grouped("llama", tie_word_embeddings=True)
        calibrate(dense, token_ids(3))
        prefetcher = Watched(dense)
        taylor = load_pass("taylor", order=order, memory=memory, kinds=("channel", "mlp", "head"))
        with offer_prefetcher(prefetcher if used else None), offload_to(tmp_path) if on_disk else nullcontext():
            taylor(dense)
        assert bool(prefetcher.order) == used
        found.append(fxprune.facts_of(dense)[fxprune.Scores].units)
    assert any("channel" in name for name in found[0]) and list(tmp_path.iterdir()) == []
    for one, other, rtol in ((1, 0, 1e-5), (2, 0, 1e-6), (3, 1, 1e-6)):
        for name, row in found[other].items():
            np.testing.assert_allclose(found[one][name], row, rtol=rtol)


@pytest.mark.parametrize("importance", ["wanda", "flap", "block-influence"])
def test_forward_criteria_are_the_same_with_prefetched_weights(importance: str) -> None:
    found = []
    dense = grouped("llama")
    calibrate(dense, token_ids(12))
    prefetcher = Watched(dense)
    kinds = ("layer",) if importance == "block-influence" else ("mlp", "head")
    for used in (None, prefetcher):
        with offer_prefetcher(used):
            load_pass(importance, kinds=kinds, batch=4)(dense)
        found.append(fxprune.facts_of(dense)[fxprune.Scores].units)
    if importance != "block-influence":
        assert len(prefetcher.order) == len(set(prefetcher.order)), "each is copied once for all batches"
    for name, row in found[0].items():
        np.testing.assert_allclose(found[1][name], row, rtol=1e-6)


def test_what_is_watched_is_seen_and_nothing_after_it_runs() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    dense = discover(net, {"x": torch.randn(2, 3)})
    nodes = {node.name: node for node in dense.graph.nodes}
    samples = [Sample({"x": torch.randn(2, 3)}, torch.zeros(1, 2)) for _ in range(3)]
    seen: list[torch.Tensor] = []
    totals: list[int] = []

    def track(batches: Iterable[Any], total: int) -> Iterable[Any]:
        totals.append(total)
        return batches

    with torch.no_grad():
        net.b.weight.fill_(float("nan"))
    observe_nodes(dense, samples, {nodes["relu"]: seen.append}, 2, track)
    expected = [net.a(sample.inputs["x"]).relu() for sample in samples]
    assert totals == [2] and [len(value) for value in seen] == [4, 2]
    torch.testing.assert_close(torch.cat(seen), torch.cat(expected).detach())
    assert not any(value.requires_grad for value in seen)


def test_samples_that_cannot_be_computed_are_refused() -> None:
    dense = discover(Net(lambda m, x: m.a(x), a=nn.Linear(3, 4)), {"x": torch.randn(2, 3)})
    last = next(node for node in reversed(dense.graph.nodes) if node.op == "call_function")
    with pytest.raises(CalibrationError, match="cannot compute a sample"):
        observe_nodes(dense, [Sample({"x": torch.randn(2, 5)}, torch.zeros(1, 2))], {last: print}, 1, lambda x, _: x)
