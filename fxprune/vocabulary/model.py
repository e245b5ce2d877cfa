"""A model with the rows of some tokens, and the settings that count tokens or name one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxprune.emit.emitted import outputs_agree
from fxprune.emit.snapshot import configs_of, nested_configs, without_storage
from fxprune.errors import PlanError, UnsupportedModelError, VerificationError
from fxprune.graph.compat import tree_leaves
from fxprune.graph.context import Refusal, attempt, preserve_rng, quiet
from fxprune.graph.tensors import as_parameter, copy_with_hooks, get_tensor, named_tensors
from fxprune.masking.masked_run import output_tensors
from fxprune.trace.inputs import alias_twin, without_cache
from fxprune.vocabulary.tokenizer import renumbered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES, _TOKENS = 2, 9
"""Size of the input that a model with fewer rows is compared on."""


@dataclass(frozen=True)
class Rows:
    """Tensors of a model that have a row for each token.

    Args:
        size: tokens, those without a text too.
        axes: the axis of tokens of each tensor, by each of its names.
        sizes: numbers of tokens of tables; some models have a table for a part of the tokens.
        each: parameters of a token.
    """

    size: int
    axes: Mapping[str, int]
    sizes: frozenset[int]
    each: int


def find_rows(model: PreTrainedModel) -> Rows:
    """The tensors with an axis as long as the input embedding, or as another vocabulary that the config names.

    Another axis may have that length, such as the positions of a table: it is told apart by building the model for more
    tokens.

    Raises:
        UnsupportedModelError: there is no embedding, or a tensor has two such axes.
    """
    table = attempt(model.get_input_embeddings)
    if not isinstance(weight := getattr(table, "weight", None), torch.Tensor) or weight.dim() != 2:
        what = f"{type(model).__name__} has no embedding with a row for each token"
        raise UnsupportedModelError(what, where="model", remedy="Leave the kind vocab out")
    size = len(weight)
    named = (value for config in configs_of(model) for name, value in vars(config).items() if "vocab_size" in name)
    sizes = {size, *(value for value in named if type(value) is int and value > 1)}
    axes: dict[str, int] = {}
    each: dict[int, int] = {}
    tensors = dict(named_tensors(model))
    candidates = {n: [axis for axis, length in enumerate(t.shape) if length in sizes] for n, t in tensors.items()}
    for name in _grow_with_tokens(model, {name: axes for name, axes in candidates.items() if axes}):
        found, tensor = candidates[name], tensors[name]
        if len(found) > 1:
            what = f"{len(found)} of its axes are as long as the vocabulary"
            raise UnsupportedModelError(what, where=name, remedy="Leave the kind vocab out")
        axes[name] = found[0]
        each[id(tensor)] = tensor.numel() // tensor.shape[found[0]] if isinstance(tensor, nn.Parameter) else 0
    return Rows(size, axes, frozenset(sizes), sum(each.values()))


def _grow_with_tokens(model: PreTrainedModel, candidates: Mapping[str, Sequence[int]]) -> list[str]:
    """Names of the tensors with one of these axes that is longer in a model for more tokens.

    All of them if only the input embedding and the output layer are among them, or if no such model can be built.
    """
    tables = [attempt(ask) for ask in (model.get_input_embeddings, model.get_output_embeddings)]
    known = {id(getattr(table, "weight", None)) for table in tables}
    if all(id(get_tensor(model, name)) in known for name in candidates):
        return list(candidates)
    config = copy.deepcopy(model.config)
    for part in nested_configs([config]):
        more = {name: value + 1 for name, value in vars(part).items() if "vocab_size" in name and type(value) is int}
        vars(part).update(more)
    with without_storage():
        larger = attempt(type(model), config)
    shapes = {} if isinstance(larger, Refusal) else {name: tensor.shape for name, tensor in named_tensors(larger)}
    found = []
    for name, axes in candidates.items():
        old, new = get_tensor(model, name).shape, shapes.get(name, ())
        if len(new) != len(old) or any(new[axis] != old[axis] for axis in axes):
            found.append(name)
    return found if any(id(get_tensor(model, name)) in known for name in found) else list(candidates)


def ids_in_settings(model: PreTrainedModel) -> frozenset[int]:
    """Ids of tokens that the config or the generation config names."""
    values = [value for settings in _settings(model) for name, value in vars(settings).items() if _is_token(name)]
    return frozenset(number for number in tree_leaves(values) if type(number) is int and number >= 0)


def trimmed_model(model: PreTrainedModel, kept: Sequence[int], *, share: bool = False) -> PreTrainedModel:
    """A copy of a model with the rows of the tokens ``kept``, in order, compared with the model on them.

    Args:
        kept: ids, of which the new one is the place.
        share: whether all other tensors are those of the model.

    Raises:
        PlanError: the model has no such tokens.
        VerificationError: the logits of kept tokens are not those of the model.
    """
    rows = find_rows(model)
    if not kept or min(kept) < 0 or max(kept) >= rows.size:
        found = f"{min(kept)} to {max(kept)}" if kept else "none"
        what = f"tokens {found} stay, the model has 0 to {rows.size - 1}"
        raise PlanError(what, where="vocabulary", remedy="Pass the model's own tokenizer, or its own plan")
    memo: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters()} if share else {}
    for name, axis in rows.axes.items():
        tensor = get_tensor(model, name)
        index = torch.tensor([old for old in kept if old < tensor.shape[axis]], device=tensor.device)
        if id(tensor) not in memo or memo[id(tensor)] is tensor:  # tied tensors are cut once
            memo[id(tensor)] = as_parameter(tensor.detach().index_select(axis, index), tensor)
    slim = copy_with_hooks(model, memo)
    new = {old: place for place, old in enumerate(kept)}
    counts = {size: sum(old < size for old in kept) for size in rows.sizes}
    owners = {name.rpartition(".")[0] for name in rows.axes}
    for path, module in slim.named_modules():
        _renumber(module, counts, new, every=path in owners)
    for settings in _settings(slim):
        _renumber(settings, counts, new)
    _compare(model, slim, torch.tensor(kept), rows)
    return slim


def _renumber(owner: Any, counts: Mapping[int, int], new: Mapping[int, int], *, every: bool = False) -> None:
    """Set numbers of tokens by ``counts``, and ids by ``new``, among the attributes of a module or a config.

    With ``every``, each attribute that is the size of a vocabulary is a number of tokens.
    """
    for name, value in vars(owner).items():
        if type(value) is int and value in counts and (every or "vocab" in name):
            vars(owner)[name] = counts[value]
        elif name == "padding_idx" or _is_token(name):
            vars(owner)[name] = renumbered(value, new)


def expected_use(model: PreTrainedModel, samples: Iterable[torch.Tensor]) -> dict[int, float]:
    """The sum of the probabilities that a model gives each token over the positions of samples ``(tokens,)``.

    Empty if the model has no logits of tokens.
    """
    rows, twin = find_rows(model), alias_twin(model)
    found = torch.zeros(rows.size, dtype=torch.float64)
    for sample in samples:
        logits = _outputs(twin, sample[None])
        if isinstance(logits, Refusal) or logits.shape[-1] != rows.size:
            return {}
        found += logits.float().softmax(-1).sum(dim=(0, 1)).double().cpu()
    return dict(enumerate(found.tolist()))


def _settings(model: PreTrainedModel) -> Iterator[Any]:
    yield from configs_of(model)
    if getattr(model, "generation_config", None) is not None:
        yield model.generation_config


_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


def _is_token(name: str) -> bool:
    """Whether a setting names tokens by their ids."""
    return name.endswith(("token_id", "token_ids", "token_index")) or name in _LISTS


def _compare(model: PreTrainedModel, slim: PreTrainedModel, kept: torch.Tensor, rows: Rows) -> None:
    """Check that both models compute the same for kept tokens, where their inputs are token ids."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(kept), (_SAMPLES, _TOKENS), generator=generator)
    wanted, found = _outputs(alias_twin(model), kept[ids]), _outputs(alias_twin(slim), ids)
    if isinstance(wanted, Refusal):
        what = f"{type(model).__name__} does not run on token ids: {wanted}"
        raise UnsupportedModelError(what, where="model", remedy="Leave the kind vocab out") from wanted.error
    wanted = wanted[..., kept.to(wanted.device)] if wanted.shape[-1] == rows.size else wanted
    what = ""
    if isinstance(found, Refusal):
        what = f"it does not run: {found}"
    elif not outputs_agree(wanted, found):
        shapes = "" if wanted.shape == found.shape else f": {list(found.shape)} in place of {list(wanted.shape)}"
        what = f"with fewer tokens it computes something else{shapes}"
    if what:
        raise VerificationError(what, where="vocabulary", remedy="Leave the kind vocab out")


def _outputs(twin: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor | Refusal:
    """The logits of a copy of a model, or what its class returns first."""
    options = without_cache(twin)
    found: Any = None
    for names in (("input_ids",), ("input_ids", "decoder_input_ids")):
        with torch.no_grad(), preserve_rng(), quiet():
            found = attempt(partial(twin, **dict.fromkeys(names, ids.to(twin.device)), **options))
        if not isinstance(found, Refusal):
            return output_tensors(found)[0]
    assert isinstance(found, Refusal)
    return found
