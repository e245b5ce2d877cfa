"""Timing: calls measured side by side, generation speed, and the speed of aligned widths."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import timeit
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import transformers
from torch.nn import functional as F
from torch.utils.benchmark import timer

from fxprune.errors import ArgumentError, EvaluationError
from fxprune.graph.compat import cache_of
from fxprune.graph.context import quiet, wrap_errors
from fxprune.offload.atomic import write_file
from fxprune.pipeline.arguments import instance, refuse, whole_number
from fxprune.pipeline.contract import Track, check_track, no_progress

K = TypeVar("K")
T = TypeVar("T")


def time_interleaved(
    jobs: Mapping[K, Callable[[], T]], rounds: int, track: Track = no_progress, what: str = "timing"
) -> dict[K, list[T]]:
    """Measure jobs side by side: every other round runs them in reverse order (A B C, C B A, ...).

    So a machine that steadily slows down or speeds up affects all of them alike. One round to warm up does not count.
    A job does its work and returns its measurement.
    """
    found: dict[K, list[T]] = {name: [] for name in jobs}
    for number in track(range(rounds + 1), what, rounds + 1):
        for name in jobs if number % 2 or not number else reversed([*jobs]):
            measured = jobs[name]()
            if number:
                found[name].append(measured)
    return found


def timed_call(call: Callable[[], Any], least_s: float = 0.05) -> Callable[[], float]:
    """A job that repeats a call for about ``least_s`` seconds and returns the seconds of one; it waits for a GPU.

    Two calls find the number of repetitions and trigger compilation. One more call warms up before each measurement,
    unless a single call takes ``least_s``: ``torch.utils.benchmark.Timer`` would make at least two, which for calls of
    half a second is most of the time.
    """
    stopwatch = timeit.Timer(call, timer=timer)
    for _ in range(2):
        once = stopwatch.timeit(1)
    number = max(1, math.ceil(least_s / once))

    def job() -> float:
        if number > 1:
            call()
        return stopwatch.timeit(number) / number

    return job


@dataclass(frozen=True)
class Speed:
    """Generation speed and memory of a model.

    Args:
        parameters: number of parameters, tied ones once.
        tokens: tokens generated after each prompt.
        prefill_ms: median time from the prompt to the first token, in milliseconds.
        decode_ms: median time per further token of all prompts, in milliseconds.
        weights: bytes of parameters and buffers.
        cache: bytes of keys and values at the end; None if the model has another kind of cache.
        peak: peak bytes on a GPU, of weights and generation; None on other devices.
        speed_up: how many times as fast as the first model further tokens were, round by round: median, least and most.
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
    speed_up: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.batch * self.prompt / self.prefill_ms * 1e3

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second."""
        return self.batch / self.decode_ms * 1e3

    def to_dict(self) -> dict[str, Any]:
        """All fields and rates as plain data."""
        return asdict(self) | {"prefill_rate": self.prefill_rate, "decode_rate": self.decode_rate}


PROMPT, TOKENS = 256, 32
"""Default lengths of a prompt and of its continuation, in tokens."""


@wrap_errors("measure_speed", "Pass language models that generate, on one device", EvaluationError)
def measure_speed(
    models: Mapping[str, Any],
    *,
    prompt: int = PROMPT,
    tokens: int = TOKENS,
    batch: int = 1,
    rounds: int = 5,
    track: Track = no_progress,
) -> dict[str, Speed]:
    """Time greedy generation of models from the same random prompts, side by side.

    Args:
        prompt: tokens per prompt.
        tokens: tokens to generate after it, at least two.
        rounds: measurements of each model, see :func:`time_interleaved`; medians are taken.
    """
    given: Any = models
    if not isinstance(given, Mapping) or not given:
        raise refuse("models", models, "models by name, as in {'dense': model}", EvaluationError)
    for name, value in {"prompt": prompt, "batch": batch, "rounds": rounds}.items():
        whole_number(name, value, least=1, error=EvaluationError)
    whole_number("tokens", tokens, least=2, error=EvaluationError)
    check_track(track)
    for name, model in models.items():
        check_generates(name, model, prompt, tokens)
    smallest = min(int(model.get_input_embeddings().weight.shape[0]) for model in models.values())
    ids = torch.randint(smallest, (batch, prompt), generator=torch.Generator().manual_seed(0))
    jobs = {name: partial(_generate, model, ids, tokens) for name, model in models.items()}
    runs = time_interleaved(jobs, rounds, track, "generating")
    speeds: dict[str, Speed] = {}
    first = next(iter(runs.values()))
    for name, model in models.items():
        prefill, decode, caches, peaks = zip(*runs[name], strict=True)
        ratios = [whole[1] / ours for whole, ours in zip(first, decode, strict=True)]
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        speeds[name] = Speed(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            batch=batch,
            prompt=prompt,
            tokens=tokens,
            prefill_ms=median(prefill) * 1e3,
            decode_ms=median(decode) * 1e3,
            weights=size,
            cache=caches[-1],
            peak=None if peaks[-1] is None else size + peaks[-1],
            speed_up=(median(ratios), min(ratios), max(ratios)),
        )
    return speeds


def check_generates(name: str, model: Any, prompt: int = PROMPT, tokens: int = TOKENS) -> None:
    """Refuse a model that cannot generate so many tokens after a prompt."""
    instance(f"models[{name!r}]", model, transformers.PreTrainedModel, "a Hugging Face model", EvaluationError)
    if not model.can_generate():
        what = f"a {type(model).__name__} does not generate"
        raise EvaluationError(what, where=name, remedy="Pass a language model")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and prompt + tokens > most:
        what = f"prompt and new tokens are {prompt + tokens}, and the model takes {most}"
        raise EvaluationError(what, where=name, remedy="Ask for a shorter prompt or fewer tokens")


def _generate(model: Any, ids: torch.Tensor, tokens: int) -> tuple[float, float, int | None, int | None]:
    """Seconds to the first token and per further token, bytes of the cache and of peak memory of a greedy generation.

    It has a fixed length, independent of the model's own settings.
    """
    ids = ids.to(model.device)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device) if on_gpu else 0
    times: list[float] = []

    def record(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Record the time of a token; never stop the generation."""
        times.append(timer())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    greedy = transformers.GenerationConfig(
        min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, use_cache=True
    )
    with quiet(logging.WARNING):
        start = timer()
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=greedy,
            stopping_criteria=transformers.StoppingCriteriaList([record]),
            return_dict_in_generate=True,
        )
    steps = [after - at for at, after in pairwise(times)]
    peak = torch.cuda.max_memory_allocated(model.device) - before if on_gpu else None
    held = [value for layer in getattr(cache_of(found), "layers", ()) for value in vars(layer).values()]
    sizes = [value.nbytes for value in held if isinstance(value, torch.Tensor)]
    return times[0] - start, median(steps), sum(sizes) if sizes else None, peak


MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Multiples that widths may be rounded to."""

_ROWS = (1, 256)
"""Tokens in a product: of a decoding step, and of a prompt."""

_SLACK = 0.03
"""Gain above which a coarser multiple is worth it: it leaves a plan less choice."""


@dataclass(frozen=True)
class Widths:
    """Relative cost of widths by the multiple that they are rounded to, on one device.

    The cost is the time per column of an MLP whose width is a multiple of that and of nothing coarser, over the least
    of all; the larger of a prompt's and of a decoding step's.
    """

    device: str
    costs: Mapping[int, float]

    def best(self) -> int:
        """The finest multiple that costs at most 3% more than the best."""
        least = min(self.costs.values())
        return min(multiple for multiple, cost in self.costs.items() if cost <= least * (1 + _SLACK))


def measure_widths(hidden: int, width: int, device: torch.device | str = "cpu", rounds: int = 9) -> Widths:
    """Time gated MLPs of widths with finer and coarser alignment, side by side.

    On a GPU in half precision, else in float32, with as many threads as torch is set to.

    Args:
        width: approximate width of the MLP; the measured widths lie below it.
        rounds: measurements of each, of which the median counts.
    """
    whole_number("hidden", hidden, least=1)
    whole_number("width", width, least=4 * MULTIPLES[-1])
    device = torch.device(device)
    sizes = {multiple: _aligned_widths(width, multiple) for multiple in MULTIPLES}
    relative = [_over_least(times) for times in _column_times(hidden, sizes, device, rounds)]
    costs = {multiple: max(found[multiple] for found in relative) for multiple in MULTIPLES}
    return Widths(device_name(device), _over_least(costs))


def _aligned_widths(width: int, multiple: int) -> list[int]:
    """Widths below ``width`` that are multiples of ``multiple``, but not of its double."""
    first = width // (2 * multiple) * 2 * multiple - multiple
    return [first - 2 * multiple * i for i in range(3)] if multiple < MULTIPLES[-1] else [first - multiple]


def _over_least(times: Mapping[int, float]) -> dict[int, float]:
    least = min(times.values())
    return {multiple: time / least for multiple, time in times.items()}


def _column_times(
    hidden: int, sizes: Mapping[int, list[int]], device: torch.device, rounds: int
) -> list[dict[int, float]]:
    """Seconds per column by multiple, for each number of rows."""
    with torch.inference_mode():
        jobs = {
            (rows, width): timed_call(_gated_mlp(rows, hidden, width, device), least_s=2e-3)
            for rows in _ROWS
            for widths in sizes.values()
            for width in widths
        }
        times = time_interleaved(jobs, rounds)
    return [{m: median(median(times[rows, w]) / w for w in widths) for m, widths in sizes.items()} for rows in _ROWS]


def _gated_mlp(rows: int, hidden: int, width: int, device: torch.device) -> Callable[[], torch.Tensor]:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        value: torch.Tensor = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return value.to(device, dtype)

    x, gate, up, down = random(rows, hidden), random(width, hidden), random(width, hidden), random(hidden, width)
    return lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def device_name(device: torch.device) -> str:
    """Name of the model of a device; of a processor, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune"


def times_file(parameters: int, device: torch.device) -> Path:
    """Path of the table of times of a model, by its number of parameters, and slim models of it on a device."""
    name = re.sub(r"\W+", "-", device_name(device).lower())
    return _cache() / "times" / f"{parameters}-{name}.json"


def widths_file() -> Path:
    """Path of the file of measured widths: ``$FXPRUNE_WIDTHS``, or a file in the user's cache."""
    return Path(os.environ.get("FXPRUNE_WIDTHS") or _cache() / "widths.json")


def write_widths(widths: Widths) -> Path:
    """Save widths, replacing earlier ones of the same device; return the file."""
    path = widths_file()
    kept = {**_load_widths(path), widths.device: {str(multiple): cost for multiple, cost in widths.costs.items()}}
    write_file(path, json.dumps(kept, indent=2) + "\n", EvaluationError, parents=True)
    return path


def read_widths(device: torch.device) -> Widths:
    """Load the widths measured on a device."""
    path, name = widths_file(), device_name(device)
    kept = _load_widths(path).get(name)
    if kept is None:
        raise ArgumentError(
            f"$round_to='auto' needs widths measured on {name}, and {path} has none",
            where="round_to",
            argument="round_to",
            value="auto",
            remedy="Call fxprune.evaluation.write_widths(fxprune.evaluation.measure_widths(hidden, width)), or name a "
            "multiple such as 32",
            shell="Name a multiple such as 32, or measure in Python: fxprune.evaluation.write_widths keeps the widths",
        )
    return Widths(name, kept)


def _load_widths(path: Path) -> dict[str, dict[int, float]]:
    try:
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {
            str(device): {int(multiple): float(cost) for multiple, cost in costs.items()}
            for device, costs in held.items()
            if costs
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArgumentError(
            f"{path} holds no widths: {error}", where="round_to", remedy="Delete it and measure again"
        ) from error
