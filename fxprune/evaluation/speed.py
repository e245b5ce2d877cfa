"""How fast models generate in transformers, side by side: a prompt read at once, then one token after the other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch.utils.benchmark import timer
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from fxprune.errors import EvaluationError
from fxprune.graph.attempts import clear_errors
from fxprune.graph.silence import quiet
from fxprune.pipeline.arguments import instance, refuse, whole_number
from fxprune.pipeline.progress import Track, check_track, no_progress

__all__ = ["Speed", "measure_speed"]


@dataclass(frozen=True)
class Speed:
    """How fast a model generates, and what it holds meanwhile.

    Args:
        parameters: their number, tied ones once.
        batch: prompts side by side.
        prompt: tokens of a prompt.
        tokens: generated after each prompt.
        prefill_ms: median time from the prompt to the first token, in milliseconds.
        decode_ms: median time of each further token of all prompts, in milliseconds.
        weights: bytes of parameters and buffers.
        cache: bytes of the keys and values in the end; None where the model keeps something else.
        peak: the most bytes of a GPU that weights and generating took; None on other devices.
    """

    parameters: int
    batch: int
    prompt: int
    tokens: int
    prefill_ms: float
    decode_ms: float
    weights: int
    cache: int | None
    peak: int | None

    @property
    def prefill_rate(self) -> float:
        """Tokens of prompts that are read in a second."""
        return self.batch * self.prompt / self.prefill_ms * 1e3

    @property
    def decode_rate(self) -> float:
        """Tokens that are generated in a second."""
        return self.batch / self.decode_ms * 1e3

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self) | {"prefill_rate": self.prefill_rate, "decode_rate": self.decode_rate}


@clear_errors("measure_speed", "Pass language models that generate, on one device", EvaluationError)
def measure_speed(
    models: Mapping[str, Any],
    *,
    prompt: int = 256,
    tokens: int = 32,
    batch: int = 1,
    rounds: int = 5,
    track: Track = no_progress,
) -> dict[str, Speed]:
    """Let models generate greedily from the same random prompts, and time them.

    In each round every model has a turn, and every other round goes through them backwards, so that a machine that
    grows slower or faster favours none. One turn of each goes before and does not count.

    Args:
        models: Hugging Face models by name.
        prompt: tokens of a prompt.
        tokens: generated after it, at least two.
        batch: prompts side by side.
        rounds: turns of each model; medians are taken.
        track: shows progress, as ``track(items, what, total)``.

    Raises:
        EvaluationError: a number is out of range, or more tokens are asked for than a model takes.
    """
    given: Any = models
    if not isinstance(given, Mapping) or not given:
        raise refuse("models", models, "models by name, as in {'dense': model}", EvaluationError)
    for name, value in {"prompt": prompt, "batch": batch, "rounds": rounds}.items():
        whole_number(name, value, least=1, error=EvaluationError)
    whole_number("tokens", tokens, least=2, error=EvaluationError)
    check_track(track)
    for name, model in models.items():
        _check(name, model, prompt + tokens)
    smallest = min(int(model.get_input_embeddings().weight.shape[0]) for model in models.values())
    ids = torch.randint(smallest, (batch, prompt), generator=torch.Generator().manual_seed(0))
    turns: dict[str, list[_Turn]] = {name: [] for name in models}
    for number in track(range(rounds + 1), "generating", rounds + 1):
        for name in models if number % 2 else reversed([*models]):
            turn = _turn(models[name], ids, tokens)
            if number:
                turns[name].append(turn)
    return {name: _speed(model, ids, tokens, turns[name]) for name, model in models.items()}


@dataclass(frozen=True)
class _Turn:
    """Seconds to the first token, seconds of each further one, and bytes."""

    prefill: float
    decode: float
    cache: int | None
    peak: int | None


class _Clock(StoppingCriteria):
    """Stops nothing, and writes down when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> Any:
        self.times.append(timer())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _check(name: str, model: Any, length: int) -> None:
    instance(f"models[{name!r}]", model, PreTrainedModel, "a Hugging Face model", EvaluationError)
    if not model.can_generate():
        raise EvaluationError(f"a {type(model).__name__} does not generate", where=name, remedy="Pass a language model")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise EvaluationError(
            f"prompt and new tokens are {length}, and the model takes {most}",
            where=name,
            remedy="Ask for a shorter prompt or fewer tokens",
        )


def _turn(model: Any, ids: torch.Tensor, tokens: int) -> _Turn:
    """Let a model generate once; a sampling model of its own is greedy here, and no end of text ends it."""
    ids = ids.to(model.device)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device) if on_gpu else 0
    clock = _Clock()
    greedy = GenerationConfig(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, use_cache=True)
    with quiet(logging.WARNING):
        start = timer()
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=greedy,
            stopping_criteria=StoppingCriteriaList([clock]),
            return_dict_in_generate=True,
        )
    steps = [after - at for at, after in zip(clock.times, clock.times[1:], strict=False)]
    peak = torch.cuda.max_memory_allocated(model.device) - before if on_gpu else None
    held = vars(found)  # its name changed from one version to the next, and asking by the old one prints a warning
    cache = held.get("cache", held.get("past_key_values"))
    return _Turn(clock.times[0] - start, median(steps), _cache_bytes(cache), peak)


def _cache_bytes(cache: Any) -> int | None:
    """Return the bytes of what a cache keeps by layer; None where it has no layers."""
    held = [value for layer in getattr(cache, "layers", ()) for value in vars(layer).values()]
    sizes = [value.numel() * value.element_size() for value in held if isinstance(value, torch.Tensor)]
    return sum(sizes) if sizes else None


def _speed(model: Any, ids: torch.Tensor, tokens: int, turns: list[_Turn]) -> Speed:
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    last = turns[-1]
    return Speed(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        batch=ids.shape[0],
        prompt=ids.shape[1],
        tokens=tokens,
        prefill_ms=median(turn.prefill for turn in turns) * 1e3,
        decode_ms=median(turn.decode for turn in turns) * 1e3,
        weights=weights,
        cache=last.cache,
        peak=None if last.peak is None else weights + last.peak,
    )
