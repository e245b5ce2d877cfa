"""Generation speed, and the speed of aligned widths."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.benchmark import Timer, timer
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from fxprune.errors import ArgumentError, EvaluationError
from fxprune.graph.context import clear_errors, quiet
from fxprune.pipeline.arguments import instance, refuse, whole_number
from fxprune.pipeline.contract import Track, check_track, no_progress

__all__ = [
    "MULTIPLES",
    "Speed",
    "Widths",
    "device_name",
    "measure_speed",
    "measure_widths",
    "read_widths",
    "widths_file",
    "write_widths",
]


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


MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)
"""What widths may be multiples of."""

_ROWS = (1, 256)
"""Tokens in a product: those of a decoding step, and of a prompt."""

_NEAR = 3
"""Widths that stand for one multiple."""

_SLACK = 0.03
"""A coarser multiple has to be worth more than that: it takes away from what a plan may choose."""

_LEAST_S = 2e-3
"""Seconds of one measurement."""


@dataclass(frozen=True)
class Widths:
    """What multiples cost on a device.

    Args:
        device: its name.
        costs: by multiple, the time of a column of an MLP whose width is a multiple of that and of nothing coarser,
            over the least of all. Of a prompt's tokens and of a decoding step's, the larger.
    """

    device: str
    costs: Mapping[int, float]

    def best(self) -> int:
        """Return the finest multiple that costs no more than 3% over the best."""
        least = min(self.costs.values())
        return min(multiple for multiple, cost in self.costs.items() if cost <= least * (1 + _SLACK))


def measure_widths(hidden: int, width: int, device: torch.device | str = "cpu", rounds: int = 9) -> Widths:
    """Time gated MLPs of widths that are multiples of more and of less, side by side.

    On a GPU in half precision, else in float32, with as many threads as torch is set to.

    Args:
        hidden: columns of what goes in.
        width: about how wide the MLP is; the widths measured lie below it.
        device: where.
        rounds: measurements of each, of which the median counts.

    Raises:
        ArgumentError: the width is too small to tell multiples apart.
    """
    whole_number("hidden", hidden, least=1)
    whole_number("width", width, least=4 * MULTIPLES[-1])
    device = torch.device(device)
    sizes = {multiple: _near(width, multiple) for multiple in MULTIPLES}
    over = [_over_least(times) for times in _times(hidden, sizes, device, rounds)]
    costs = {multiple: max(found[multiple] for found in over) for multiple in MULTIPLES}
    return Widths(device_name(device), _over_least(costs))


def _near(width: int, multiple: int) -> list[int]:
    """Return widths below that are multiples of one number and not of its double."""
    first = width // (2 * multiple) * 2 * multiple - multiple
    return [first - 2 * multiple * i for i in range(_NEAR)] if multiple < MULTIPLES[-1] else [first - multiple]


def _over_least(times: Mapping[int, float]) -> dict[int, float]:
    least = min(times.values())
    return {multiple: time / least for multiple, time in times.items()}


def _times(hidden: int, sizes: Mapping[int, list[int]], device: torch.device, rounds: int) -> list[dict[int, float]]:
    """Return seconds of a column by multiple, for each number of rows."""
    jobs: list[tuple[int, int, int, Callable[[], float]]] = []
    for rows in _ROWS:
        jobs += [(rows, m, width, _job(rows, hidden, width, device)) for m, widths in sizes.items() for width in widths]
    found: dict[tuple[int, int, int], list[float]] = {job[:3]: [] for job in jobs}
    with torch.inference_mode():
        for number in range(rounds):
            for rows, multiple, width, job in jobs if number % 2 == 0 else reversed(jobs):
                found[rows, multiple, width].append(job() / width)

    def cost(rows: int, multiple: int) -> float:
        return median(median(times) for key, times in found.items() if key[:2] == (rows, multiple))

    return [{multiple: cost(rows, multiple) for multiple in sizes} for rows in _ROWS]


def _job(rows: int, hidden: int, width: int, device: torch.device) -> Callable[[], float]:
    """Return a job that measures the seconds of a gated MLP."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        value: torch.Tensor = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return value.to(device, dtype)

    x, gate, up, down = drawn(rows, hidden), drawn(width, hidden), drawn(width, hidden), drawn(hidden, width)

    def call() -> Any:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    with torch.inference_mode():
        timer.timeit(2)
        number = max(1, round(_LEAST_S / timer.timeit(2).mean))
    return lambda: float(timer.timeit(number).mean)


def device_name(device: torch.device) -> str:
    """Return what the device is called: the same for all of its kind, with the number of threads of a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def widths_file() -> Path:
    """Return where what was measured is kept: ``$FXPRUNE_WIDTHS``, or a file in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FXPRUNE_WIDTHS") or cache / "fxprune" / "widths.json")


def write_widths(widths: Widths) -> Path:
    """Keep what was measured on a device, in place of what was kept of it; return the file."""
    path = widths_file()
    kept = {**_kept(path), widths.device: {str(multiple): cost for multiple, cost in widths.costs.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return path


def read_widths(device: torch.device) -> Widths:
    """Return what was measured on a device.

    Raises:
        ArgumentError: nothing was, or the file holds something else.
    """
    path, name = widths_file(), device_name(device)
    kept = _kept(path).get(name)
    if kept is None:
        raise ArgumentError(
            f"round_to='auto' needs widths measured on {name}, and {path} has none",
            where="round_to",
            remedy="Call fxprune.evaluation.write_widths(fxprune.evaluation.measure_widths(hidden, width)), or name a "
            "multiple such as 32",
        )
    return Widths(name, kept)


def _kept(path: Path) -> dict[str, dict[int, float]]:
    """Return what a file holds by device; nothing where there is no file."""
    try:
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {
            str(device): {int(multiple): float(cost) for multiple, cost in costs.items()}
            for device, costs in held.items()
            if costs
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"{path} holds no widths: {error}", where="round_to", remedy="Take it away and measure again"
        ) from error
