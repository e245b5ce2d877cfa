"""Every kind of unit of each family, of other models, and of plain modules: removing it equals masking it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce

import numpy as np
import pytest
import torch
from torch import nn
from transformers import FocalNetConfig, FocalNetForImageClassification

import fxprune
from fxprune.axes import Keep
from fxprune.discovery.explain import frozen_axes
from fxprune.emit.snapshot import shapes_of
from fxprune.graph.facts import Blocks, facts_of
from fxprune.removal.plan import Plan, plan_of
from tests.architectures import modules
from tests.architectures.library import LIBRARY, stirred
from tests.models import FAMILIES, tiny, token_ids
from tests.oracle import (
    Net,
    axes_of,
    check_kinds_remove_exactly,
    check_removes_exactly,
    discover,
    graph_of,
    groups_of,
    shape_of,
    zeroed,
)
from tests.random_networks import check_every_removal
from tests.remembered import grouped, model_of, pruned
from tests.tiers import tiers

KINDS_OF_ALL = {"mlp", "head", "head_dim", "channel", "layer"}


@pytest.mark.parametrize("family", tiers(FAMILIES, "llama", "gpt2"))
def test_groups_remove_exactly(family: str) -> None:
    depth = "n_layer" if family in ("gpt2", "bloom") else "num_hidden_layers"
    model = tiny(family, use_cache=False, **{depth: 2})
    dense = check_every_removal(model, {"input_ids": token_ids()}, dynamic=True, thorough=False)
    assert {group.kind for group in groups_of(dense)} == KINDS_OF_ALL
    assert {"mlp", "head_dim"} <= {group.kind for group in groups_of(dense) if not group.renormalised}


@pytest.mark.slow
def test_slopes_built_from_positions_stay_with_their_heads() -> None:
    """A model with fewer heads would make other slopes; those that stay are those of the heads that stay."""
    dense, ids = grouped("bloom"), token_ids()
    model = model_of(dense)
    (heads,) = [group for group in groups_of(dense) if group.kind == "head"]
    assert {member.name for member in heads.members if not member.trained} == {"constant_0"}
    assert heads.factor is not None
    plan = plan_of(axes_of(dense), Keep({heads.factor: np.array([False, True, True, False])}))
    assert "constant_0" not in plan.kept  # a name in this graph alone
    result = fxprune.apply(model, Plan.from_json(plan.to_json()))
    before = dense.get_buffer("constant_0").flatten()
    assert torch.equal(result.graph_module.get_buffer("constant_0").flatten(), before[1:3])
    with torch.no_grad():
        assert torch.allclose(result(input_ids=ids).logits, zeroed(model, plan)(ids).logits, atol=1e-4)


@pytest.mark.parametrize("family", tiers(FAMILIES, "llama"))
@pytest.mark.parametrize("kind", ["channel", "layer"])
def test_width_and_depth(family: str, kind: str) -> None:
    result = pruned(
        family, importance="l2", select="select-by-group-ratio{group_ratio=0.34}", kinds=(kind,), protect=()
    )
    dense, slim = result.report.parameters
    assert slim < dense
    assert result.report.verification_error is not None and result.report.verification_error < 1e-5
    assert result(input_ids=token_ids(3, 5)).logits.shape == (3, 5, 131)
    assert result.model is not None, result.report.model_reasons


Kinds = Mapping[str, Sequence[int]]
Inputs = dict[str, torch.Tensor]

IDS = torch.randint(4, 31, (2, 6), generator=torch.Generator().manual_seed(0))
TEXT = {"ids": IDS}

FROM_LIBRARY: dict[str, Kinds] = {
    "t5": {"head": [4, 4, 4], "head_dim": [5] * 6, "mlp": [26, 26]},
    "bart": {"head": [4, 4, 4], "head_dim": [5] * 6, "mlp": [26, 22]},
    "whisper": {"mlp": [20, 26, 22], "head": [4, 4, 4], "head_dim": [5] * 6, "channel~": [20]},
    "bert": {"channel~": [24], "head": [4], "head_dim": [6, 6], "mlp": [26]},
    "modernbert": {"channel~": [24], "head": [4], "head_dim": [3], "mlp": [26]},
    "deberta": {"channel~": [24], "head": [4], "head_dim": [6, 6], "channel": [24], "mlp": [26]},
    "albert": {"mlp~": [9], "channel~": [24], "head": [4], "head_dim": [6, 6], "mlp": [26]},
    "vit": {"channel~": [24], "head": [4], "head_dim": [6, 6], "mlp": [26]},
    "swin": {"channel~": [12], "head": [3, 3], "head_dim": [4] * 4, "mlp": [48, 48]},
    "convnext": {"channel~": [6, 10], "mlp": [24, 40]},
    "resnet": {"conv": [6, 8, 12], "mlp": [8, 12]},
    "regnet": {"conv": [6, 8, 12], "mlp": [2, 4, 4, 2, 3, 4, 4, 2]},
    "wav2vec2": {"mlp": [6, 26], "mlp~": [8], "channel~": [2, 12], "head": [4], "head_dim": [6, 6]},
    "clip": {"head": [4, 4], "head_dim": [4, 4, 6, 6], "mlp": [22, 26]},
}
"""For each model of transformers the sizes of its groups; a tilde where a statistic runs over them."""


def images(channels: int, side: int) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def mixed(mixer: type[nn.Module], *sizes: int) -> Callable[[], nn.Module]:
    return lambda: modules.MemoryLM(mixer(16, *sizes))


ENCODED = {"channel~": [18], "head": [3, 3], "head_dim": [6, 6], "mlp": [22, 22]}

PLAIN: dict[str, tuple[Callable[[], nn.Module], Inputs, Kinds]] = {
    "two-dimensional-rotary": (
        modules.TwoDimensionalLM,
        {"input_ids": IDS},
        {"channel~": [24], "head": [3, 3], "head_dim": [2, 8, 2, 8], "mlp": [20, 20]},
    ),
    "selective-scan": (mixed(modules.SelectiveScan, 20, 5, 3), TEXT, {"mlp~": [16], "mlp": [20, 3], "head_dim": [5]}),
    "retention": (mixed(modules.Retention, 3, 6), TEXT, {"mlp~": [16], "head": [3], "head_dim": [6], "head_dim~": [6]}),
    "time-mix": (mixed(modules.TimeMix, 18, 22), TEXT, {"mlp~": [16], "mlp": [18, 22]}),
    "delta-rule": (
        mixed(modules.DeltaRule, 3, 5, 6),
        {"ids": IDS[:, :4]},
        {"mlp~": [16], "head": [3], "head_dim": [5], "head_dim~": [6]},
    ),
    "down-and-up": (modules.DownAndUp, {"image": images(3, 8)}, {"mlp": [4, 5, 9, 16], "mlp~": [3, 4]}),
    "token-mixer": (modules.TokenMixer, {"image": images(3, 6)}, {"mlp~": [14], "mlp": [11, 17]}),
    "encoder": (partial(modules.Encoder, batch_first=True, norm_first=True), TEXT, ENCODED),
    "encoder-tokens-first": (partial(modules.Encoder, batch_first=False, norm_first=False), TEXT, ENCODED),
    "translator": (
        modules.Translator,
        {"source": IDS, "target": IDS[:, :4]},
        {"channel~": [16], "head": [4, 4, 4], "head_dim": [4, 4, 4], "mlp": [20, 20]},
    ),
    "recurrent": (partial(modules.Recurrent, nn.LSTM), TEXT, {"mlp": [6, 5]}),
    "recurrent-gated": (partial(modules.Recurrent, nn.GRU), TEXT, {"mlp": [6, 5]}),
    "reader": (modules.Reader, TEXT, {"mlp": [10, 12, 4, 12], "head~": [3], "head_dim": [4]}),
}
"""Networks written from scratch: how to make one, what it takes, and the sizes of its groups."""


@pytest.mark.parametrize("name", tiers(FROM_LIBRARY, "bert"))
def test_models_of_transformers_that_are_no_causal_ones(name: str) -> None:
    model, inputs = LIBRARY[name]()
    check_kinds_remove_exactly(stirred(model), inputs, FROM_LIBRARY[name])


@pytest.mark.parametrize("name", tiers(PLAIN, "retention", "encoder"))
def test_plain_modules(name: str) -> None:
    make, inputs, kinds = PLAIN[name]
    check_kinds_remove_exactly(stirred(make()), inputs, kinds)


def test_default_kinds_take_channels_of_convolutions_and_leave_the_stream_under_norms() -> None:
    """Of a convolutional network without blocks nothing went, and of one with residual stages, their insides alone."""

    def block() -> Net:
        inside = {"inside": nn.Conv2d(9, 7, 3, padding=1), "out": nn.Conv2d(7, 9, 1), "norm": nn.BatchNorm2d(9)}
        return Net(lambda m, x: (x + m.norm(m.out(m.inside(x).relu()))).relu(), **inside)

    parts = {"first": nn.Conv2d(3, 9, 3), "blocks": nn.Sequential(block(), block()), "out": nn.Linear(9, 4)}
    network = stirred(Net(lambda m, x: m.out(m.blocks(m.first(x)).mean((-1, -2))), **parts))
    image = {"x": images(3, 8)}
    check_kinds_remove_exactly(network, image, {"conv": [9], "mlp": [7, 7]})
    options = {"recipe": "llm-pruner", "importance": "l2", "protect": (), "example_inputs": image}
    result = fxprune.prune(network, None, ratio=0.3, ranking="local", **options)
    assert result.report.achieved == pytest.approx(0.3, abs=0.03)
    assert all(group.after < group.before for group in result.report.groups), result.report.groups
    model, inputs = LIBRARY["convnext"]()
    kinds = {group.kind for group in groups_of(discover(stirred(model), inputs))}
    assert kinds == {"mlp", "channel", "layer"}, "a norm runs over the stream of its stages"


def test_each_group_of_a_convolutional_network_alone() -> None:
    check_removes_exactly(stirred(modules.DownAndUp()), {"image": images(3, 8)})


def test_interleaved_queries_keys_and_values_read_as_they_lie() -> None:
    dense = discover(stirred(modules.TwoDimensionalLM(layers=1)), {"input_ids": IDS})
    turned = " | ".join(["b:2"] * 8)  # two halves of two halves, of queries and of keys
    assert shape_of(dense, "layers.0.attention.query_key_value.weight")[0] == f"(a:3 * [{turned} | c:8])"
    frequencies = axes_of(dense).tensors["layers.0.attention.rotary.inv_freq"][0]
    held = [member.name for group in groups_of(dense) if group.factor == frequencies for member in group.members]
    assert "layers.0.attention.query_key_value.weight" in held


@pytest.mark.slow
def test_tables_of_biases_by_relative_place_lose_the_column_of_a_head() -> None:
    model, inputs = LIBRARY["swin"]()
    dense = discover(stirred(model), inputs)
    heads = [group for group in groups_of(dense) if group.kind == "head"]
    tables = [[m.axis for m in group.members if m.name.endswith("relative_position_bias_table")] for group in heads]
    assert tables == [[1], [1]]


@pytest.mark.slow
def test_layers_of_a_few_classes_that_repeat_are_blocks() -> None:
    class Layer(nn.Module):
        def __init__(self, mixer: nn.Module) -> None:
            super().__init__()
            self.mixer = mixer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mixer(x)  # type: ignore[no-any-return]

    class Other(Layer):
        pass

    def hybrid(*layers: nn.Module) -> Net:
        parts = {"embedding": nn.Embedding(31, 16), "readout": nn.Linear(16, 31), "layers": nn.ModuleList(layers)}
        return Net(lambda m, ids: m.readout(reduce(lambda x, layer: layer(x), m.layers, m.embedding(ids))), **parts)

    scan, network = modules.SelectiveScan(16, 20, 5, 3), nn.Sequential(nn.Linear(16, 19), nn.ReLU(), nn.Linear(19, 16))
    model = hybrid(Layer(scan), Other(network), Layer(modules.Retention(16, 3, 6)))
    dense = check_kinds_remove_exactly(
        stirred(model),
        {"x": IDS},
        {"channel": [16], "mlp": [20, 3, 19], "head": [3], "head_dim": [5, 6], "head_dim~": [6]},
    )
    names = {group.name for group in groups_of(dense)}
    assert {"layers.0/mlp", "layers.1/mlp", "layers.2/head", "layers.0/layer", "layers.1/layer"} <= names
    assert facts_of(discover(hybrid(Layer(scan), Other(network)), {"x": IDS}))[Blocks].paths == ()


def test_an_op_over_a_whole_width_freezes_it_and_leaves_the_rest() -> None:
    """A Fourier transform over channels mixes all of them; the network beside it can still go."""

    def body(m: Net, ids: torch.Tensor) -> torch.Tensor:
        x = m.embedding(ids)
        x = x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real
        return m.readout(x + m.down(torch.relu(m.up(x))))

    parts = {"embedding": nn.Embedding(31, 12), "readout": nn.Linear(12, 31)}
    model = Net(body, **parts, up=nn.Linear(12, 17), down=nn.Linear(17, 12))
    dense = check_kinds_remove_exactly(stirred(model), {"x": IDS}, {"mlp": [17]})
    assert "fft" in frozen_axes(graph_of(dense))["embedding.weight[1]"].reason


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["llm-pruner", "fast{tune}"])
@pytest.mark.parametrize("name", ["vit", "vit-labels", "bert", "bert-labels", "t5", "t5-labels", "clip"])
def test_models_that_predict_no_next_tokens_are_scored_fitted_and_tuned(name: str, recipe: str) -> None:
    """Such samples were refused, or scored on the next token of an input that the model sees whole."""
    model, inputs = LIBRARY[name.partition("-")[0]]()
    samples = {key: torch.cat([value] * 3) for key, value in inputs.items() if key != "decoder_input_ids"}
    if name == "vit-labels":
        samples["labels"] = torch.arange(6) % 2
    elif name.endswith("labels"):
        samples["labels"] = samples["input_ids"][:, : 4 if name.startswith("t5") else None]
    tuned = {"recipe": "fast", "tune": "tune{epochs=1}"} if "tune" in recipe else {"recipe": recipe}
    result = fxprune.prune(stirred(model), samples, importance="taylor", ratio=0.1, protect=(), **tuned)
    assert result.report.verification_error is not None and result.report.verification_error < 1e-4
    assert not any("labels do not count" in note for note in result.report.notes)
    assert all(score > 0 for row in result.scores.units.values() for score in row.ravel().tolist()[:1])


@pytest.mark.slow
def test_groups_that_a_class_cannot_express_stay_whole_and_a_model_comes_out() -> None:
    """Contexts of a focal modulation are as wide as the stage by its class; there used to be no model."""
    torch.manual_seed(0)
    config = FocalNetConfig(image_size=32, embed_dim=16, depths=[2, 2], num_labels=3)
    model = FocalNetForImageClassification(config).eval()
    image = torch.randn(2, 3, 32, 32)
    options = {"recipe": "llm-pruner", "importance": "l2", "ratio": 0.1, "example_inputs": {"pixel_values": image}}
    result = fxprune.prune(model, **options)
    assert isinstance(result.model, FocalNetForImageClassification)
    assert result.report.achieved == pytest.approx(0.1, abs=0.01)
    assert any("of kind mlp left whole: the model's class cannot express it" in note for note in result.report.notes)
    with torch.no_grad():
        torch.testing.assert_close(result.model(image).logits, result.graph_module(image)[0], rtol=1e-4, atol=1e-5)
    contexts = [size for name, size in shapes_of(result.model).items() if "projection_context" in name]
    assert contexts == [size for name, size in shapes_of(model).items() if "projection_context" in name]
