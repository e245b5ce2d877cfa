"""Calibration samples with their loss, samples with replaced tokens, and verification inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx, nn

from fxprune.errors import ArgumentError, CalibrationError, FxpruneError, PassError
from fxprune.graph.compat import is_free, size_hint, tree_leaves, tree_map
from fxprune.graph.context import Refusal, silence_stderr
from fxprune.graph.facts import Fact
from fxprune.graph.shapes import failed_check
from fxprune.graph.tensors import device_of, get_tensor, map_tensors
from fxprune.offload.prefetch import compute_device
from fxprune.pipeline.arguments import refuse

T = TypeVar("T")

IGNORED = -100
"""Label of a token that does not count in the loss: the one ignored by torch and transformers by default."""


@dataclass(frozen=True)
class Sample:
    """One sample.

    Args:
        inputs: keyword inputs of the graph, in its order: tensors of a batch of one, other inputs as traced.
        labels: the token at each position of the input, ``(1, tokens)``; the loss shifts them by one. For a model that
            predicts no next tokens all are ignored, and there are none if it reads no tokens.
        own: labels in the form that such a model takes, by the name that it has for them; None without labels.
    """

    inputs: Mapping[str, Any]
    labels: torch.Tensor
    own: Mapping[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Calibration(Fact):
    """Samples for criteria and fits: one or more.

    Args:
        source: where they are from, in words.
        written: the number of them that the model wrote.
    """

    missing_error: ClassVar[type[PassError]] = CalibrationError
    remedy: ClassVar[str] = "Pass token ids as calibration, or choose an importance that needs no data"
    samples: tuple[Sample, ...]
    source: str = "the samples passed"
    written: int = 0


@dataclass(frozen=True)
class HeldOut(Fact):
    """Samples that training is stopped by, beside those it trains on."""

    samples: tuple[Sample, ...]


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token: logits ``(batch, tokens, vocabulary)``, labels ``(batch, tokens)``."""
    flat = logits[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED)


def require_logits(outputs: Sequence[torch.Tensor], labels: torch.Tensor, name: str) -> torch.Tensor:
    """Logits ``(batch, tokens, vocabulary)`` for labels ``(batch, tokens)``: the first of the float outputs of a graph.

    Raises:
        PassError: the first output has another shape; ``name`` is the pass that needs a loss.
        CalibrationError: there are more or fewer labels than logits, or a label is outside the vocabulary.
    """
    logits = outputs[0] if outputs else None
    if logits is not None and logits.dim() == 3 and len(logits) == len(labels) and logits.shape[1] != labels.shape[1]:
        what = f"{labels.shape[1]} labels for logits {tuple(logits.shape)}"
        remedy = "Pass as many labels as tokens, or none if the labels are the tokens"
        raise CalibrationError(what, where="calibration", remedy=remedy)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != labels.shape:
        found = "no float tensor" if logits is None else f"a tensor of shape {tuple(logits.shape)}"
        what = f"the model gives {found} for labels {tuple(labels.shape)}, not logits (samples, tokens, vocabulary)"
        remedy = "Pass a language model, or choose an importance without a loss, such as l1, l2 or random"
        raise PassError(what, where=f"pass {name}", remedy=remedy)
    counted = labels[labels != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[2]:
        bad = int(counted.min()) if int(counted.min()) < 0 else int(counted.max())
        what = f"labels hold {bad}, the model gives logits for 0 to {logits.shape[2] - 1}"
        raise CalibrationError(what, where="calibration", remedy=f"Label positions that do not count with {IGNORED}")
    return logits


@contextmanager
def clear_sample_errors(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Turn any exception while a graph computes calibration samples into a CalibrationError, and print nothing."""
    try:
        with silence_stderr():
            yield
    except (FxpruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # ops refuse bad values with exceptions of any type
        shapes = ", ".join(
            f"{name} {tuple(value.shape)}" for name, value in inputs.items() if isinstance(value, torch.Tensor)
        )
        what = f"the model cannot compute a sample of {shapes}: {Refusal(error)}"
        remedy = "Pass samples that the model itself accepts, no longer than its positions: of text, fewer $tokens"
        raise CalibrationError(what, where="calibration", remedy=remedy) from error


def embedding_rows(graph_module: fx.GraphModule) -> dict[str, int]:
    """Rows of the embedding of each input that is looked up in one, in the order of the lookups.

    For an input that is looked up in several, the smallest counts. Views of an input, such as a flattened batch, count
    as the input.
    """
    found: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.target is not torch.ops.aten.embedding.default:
            continue
        table, looked_up = node.args[:2]
        while True:  # some models flatten or transpose their ids first
            schema = getattr(looked_up.target, "_schema", None)
            alias = schema.returns[0].alias_info if schema is not None and len(schema.returns) == 1 else None
            if alias is None or alias.is_write:
                break
            looked_up = looked_up.args[0]
        if table.op == "get_attr" and looked_up.op == "placeholder":
            name, rows = str(looked_up.target), get_tensor(graph_module, str(table.target)).shape[0]
            found[name] = min(rows, found.get(name, rows))
    return found


def token_input(graph_module: fx.GraphModule) -> str | None:
    """Name of the input that holds token ids: the first that is looked up in an embedding; None without one."""
    return next(iter(embedding_rows(graph_module)), None)


def most_positions(model: Any) -> int | None:
    """Tokens of the longest sequence that a model was made for; None if its config does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 1 else None  # some say -1 for any number


def fixed_tokens(graph_module: fx.GraphModule) -> int | None:
    """The one number of tokens that a graph runs on; None if it takes any, or no token ids alone."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if [str(node.target) for node in placeholders] != [token_input(graph_module)]:
        return None
    shape = placeholders[0].meta["val"].shape
    return None if len(shape) != 2 or is_free(shape[1]) else int(shape[1])


def batch_indices(samples: Sequence[Sample], graph_module: fx.GraphModule, most: int) -> Iterator[tuple[int, ...]]:
    """Yield the indices of each batch of samples of one shape; a graph with a fixed batch size gets them one by one."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    tensors = [node.meta["val"] for node in placeholders if isinstance(node.meta["val"], torch.Tensor)]
    size = most if all(is_free(value.shape[0]) for value in tensors) else 1
    shapes: dict[tuple[torch.Size, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        shapes.setdefault(tuple(v.shape for v in sample.inputs.values() if isinstance(v, torch.Tensor)), []).append(i)
    for group in shapes.values():
        for start in range(0, len(group), size):
            yield tuple(group[start : start + size])


def batched(samples: Sequence[Sample], graph_module: fx.GraphModule) -> dict[str, Any]:
    """One batch of inputs from samples of the same shape, on the device that the graph runs on."""
    device = compute_device(graph_module)
    return {
        name: torch.cat([s.inputs[name] for s in samples]).to(device) if isinstance(value, torch.Tensor) else value
        for name, value in samples[0].inputs.items()
    }


def spread(samples: Sequence[T], most: int | None) -> tuple[T, ...]:
    """At most ``most`` of the samples, evenly spaced; all of them for None."""
    if most is None or most >= len(samples):
        return tuple(samples)
    return tuple(samples[i * len(samples) // most] for i in range(most))


def hold_out(samples: Sequence[Sample], count: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """``count`` samples, evenly spread, and all the others."""
    taken = spread(samples, count)
    numbers = {id(sample) for sample in taken}
    return taken, tuple(sample for sample in samples if id(sample) not in numbers)


def has_stalled(errors: Sequence[float], patience: int) -> bool:
    """Whether none of the last ``patience`` errors on held-out samples is a new best, and they do not fall either.

    At the highest rates of a schedule a model is often worse than at its start, and gets better as the rate falls.
    """
    last, before = errors[-patience:], errors[:-patience]
    return bool(before) and not min(last) < min(before) and not last[-1] < last[0]


def plain_tokens(tokenizer: Any, classes: int) -> torch.Tensor:
    """Ids below ``classes`` of all tokens of a tokenizer that are not special; empty if it does not list them."""
    listed = getattr(tokenizer, "get_vocab", None)
    if not callable(listed):
        return torch.empty(0, dtype=torch.long)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}.union(getattr(tokenizer, "all_special_ids", ()))
    return torch.tensor(sorted(i for i in set(listed().values()) - special if i < classes), dtype=torch.long)


def noised(
    samples: Sequence[Sample], name: str, copies: int, most: float, vocabulary: torch.Tensor, seed: int
) -> tuple[Sample, ...]:
    """Copies of samples with some tokens replaced at random; all samples once, then all of them again.

    One copy in four stays as it is, since models are used on text without noise. In each of the others a random part
    of the tokens, up to ``most``, is replaced, half of them by any token of the vocabulary, the others by tokens from
    elsewhere in the samples. The first token stays, and replaced tokens do not count as labels. A teacher's logits
    after misplaced tokens carry as much of its knowledge, and since no two copies are alike, the student cannot
    memorise them.

    Args:
        name: name of the input that holds token ids, ``(1, tokens)``.
        most: largest fraction of the tokens to replace.
        vocabulary: token ids to replace by; empty to draw from the samples only.
    """
    draw = torch.Generator().manual_seed(seed)
    known = torch.cat([sample.inputs[name].reshape(-1).cpu() for sample in samples])

    def copy(sample: Sample) -> Sample:
        if float(torch.rand((), generator=draw)) < 0.25:
            return sample
        ids = sample.inputs[name]
        size, part = ids.numel(), most * float(torch.rand((), generator=draw))
        hit = torch.rand(size, generator=draw) < part
        hit[0] = False
        other = known[torch.randint(len(known), (size,), generator=draw)]
        if len(vocabulary):
            any_token = vocabulary[torch.randint(len(vocabulary), (size,), generator=draw)]
            other = torch.where(torch.rand(size, generator=draw) < 0.5, any_token, other)
        hit = hit.view(ids.shape).to(ids.device)
        replaced = torch.where(hit, other.to(ids).view(ids.shape), ids)
        labels = sample.labels.masked_fill(hit, IGNORED) if sample.labels.shape == ids.shape else sample.labels
        return dataclasses.replace(sample, inputs={**sample.inputs, name: replaced}, labels=labels)

    return tuple(copy(sample) for _ in range(copies) for sample in samples)


BATCH, TOKENS = 2, 16
"""Large enough that batch size and position matter, and cheap."""


@dataclass(frozen=True, eq=False)
class VerificationInputs(Fact):
    """Keyword inputs that the dense and the slim graph are compared on, in the order of the graph."""

    values: Mapping[str, Any]


def check_names(example_inputs: Any, *, on_meta: bool = True) -> None:
    """Refuse example inputs that are not a mapping from names to tensors and plain values; None is accepted."""
    if example_inputs is None:
        return
    named = isinstance(example_inputs, Mapping) and example_inputs and all(isinstance(n, str) for n in example_inputs)
    if not named:
        wanted = "the keyword arguments of forward, {'name': tensor, ...}, or None"
        raise refuse("example_inputs", example_inputs, wanted)
    leaves = {name: tree_leaves(value) for name, value in example_inputs.items()}
    for name, values in leaves.items():
        for value in values:
            _check_value(f"example_inputs[{name!r}]", value, on_meta)
    sizes = [value.numel() for values in leaves.values() for value in values if isinstance(value, torch.Tensor)]
    if sizes and not any(sizes):
        raise ArgumentError("they are empty", where="example_inputs", remedy="Pass at least one sample")


def _check_value(name: str, value: Any, on_meta: bool) -> None:
    if not isinstance(value, torch.Tensor):
        if value is not None and not isinstance(value, bool | int | float | str | torch.dtype | torch.device):
            raise refuse(name, value, "a tensor, or lists, tuples and dicts of tensors")
        return
    if value.is_meta:
        wrong = "" if on_meta else "on meta, without values, and the model is not"
    elif value.layout != torch.strided or value.is_nested or value.is_quantized:
        wrong = "not a plain tensor"
    else:
        wrong = "NaN in places" if value.is_floating_point() and bool(value.isnan().any()) else ""
    if wrong:
        raise ArgumentError(f"it is {wrong}", where=name, remedy="Pass a tensor of numbers")


def make_inputs(graph_module: fx.GraphModule, given: Mapping[str, Any] | None, seed: int) -> dict[str, Any]:
    """Keyword inputs for a graph: the caller's ``given``, else random token ids ``(2, 16)`` or random floats."""
    inputs = _make(graph_module, given or {}, seed, (BATCH, TOKENS))
    return _make(graph_module, given or {}, seed, None) if failed_check(graph_module, inputs) else inputs


def resize_inputs(graph_module: fx.GraphModule, inputs: Mapping[str, Any], sizes: tuple[int, int]) -> dict[str, Any]:
    """Inputs of other batch size and length: cut, or repeated from the start, along dynamic axes."""

    def resize(traced: Any, value: Any) -> Any:
        for axis, size in enumerate(sizes[: traced.dim()] if isinstance(traced, torch.Tensor) else ()):
            if is_free(traced.shape[axis]):
                value = value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])
        return value

    placeholders = {str(node.target): node for node in graph_module.graph.nodes if node.op == "placeholder"}
    return {name: tree_map(resize, placeholders[name].meta["val"], value) for name, value in inputs.items()}


def _make(
    graph_module: fx.GraphModule, given: Mapping[str, Any], seed: int, sizes: tuple[int, int] | None
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows = embedding_rows(graph_module)
    device = device_of(graph_module)
    inputs: dict[str, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name in given:
            inputs[name] = map_tensors(given[name], lambda tensor: tensor.to(device))
            continue

        def random(value: torch.Tensor, most: int = rows.get(name, 2)) -> torch.Tensor:
            shape = [size_hint(size) for size in value.shape]
            for axis, size in enumerate((sizes or ())[: value.dim()]):
                if is_free(value.shape[axis]):
                    shape[axis] = size
            if value.dtype.is_floating_point:
                return torch.randn(shape, generator=generator).to(device, value.dtype)
            return torch.randint(most, shape, generator=generator).to(device, value.dtype)

        inputs[name] = map_tensors(node.meta["val"], random)
    return inputs
