"""All of a prune that comes before its first weight is read: its passes and samples, each refused where it is wrong.

A dry run prepares as a prune does, so that both refuse the same in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxprune.cli.interrupts import at_once
from fxprune.cli.load import check_device, is_gguf, load_tokenizer
from fxprune.cli.naming import is_config_alone
from fxprune.errors import ArgumentError

__all__ = ["TOKENS", "Prepared", "check_removes", "most_samples", "planned", "prepare", "reader_of", "samples_of"]

TOKENS = 128
"""Of a sample, where no number is asked for."""


@dataclass(frozen=True)
class Prepared:
    """What a prune works with, besides the model.

    Args:
        passes: that run, in order; those that read samples may not have them yet.
        tokenizer: of the model; None where there is none and none is needed.
        samples: token ids ``(samples, tokens)`` of the text that was named; None where none was, and where a model that
            is a config alone has no tokenizer for it.
    """

    passes: tuple[Any, ...]
    tokenizer: Any
    samples: Any


def prepare(values: Mapping[str, Any], options: Mapping[str, Any]) -> Prepared:
    """Return what a prune works with, or say what is wrong.

    Args:
        values: of the options of the command.
        options: of a prune.

    Raises:
        FxpruneError: options do not go together, the device is not there, the tokenizer cannot be read, the text is too
            short, or an argument of a pass names what is not there.
    """
    with at_once():
        import fxprune.api
        from fxprune.data.calibration import Calibration
    bare = fxprune.prune_pipeline(None, **options).passes  # none of them reads samples but from a file of its own
    check_removes(bare)
    check_device(values["device"])
    passes, file = planned(values, options), values["calibration"]
    reads = any(Calibration in step.gives for step in bare)
    built_in = not reads and any(Calibration in step.needs for step in bare)  # and a tokenizer makes samples of it
    wanted = built_in or file is not None or _writes_tokenizer(values)
    otherwise = "; a prune by weights alone, as with --importance l2, needs none" if built_in else ""
    needed = wanted and not (values["dry_run"] and is_config_alone(values["model"], values["gguf_file"]))
    tokenizer = None
    if wanted or not values["dry_run"]:
        tokenizer = load_tokenizer(values["model"], values["gguf_file"], needed=needed, otherwise=otherwise)
    samples = None
    if tokenizer is not None:
        samples = samples_of(values, tokenizer, values["samples"] or most_samples(passes))
    reader = reader_of(passes)
    rows = getattr(reader, "file", "")
    for step in passes:
        if step is not reader or rows:
            step.check_arguments()
    return Prepared(passes, tokenizer, samples)


def planned(values: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the passes that would run, with samples that are not read yet.

    Args:
        values: of the options of the command.
        options: of a prune.
    """
    import fxprune.api

    named = dict(options)
    if values["low_memory"]:
        named |= {"memory": "low", "tune": options["tune"] or "none"}
    given = None if values["calibration"] is None else ()
    passes = fxprune.prune_pipeline(given, tokenizer=_unread, **named).passes
    return tuple(map(_silent, passes)) if values["low_memory"] else tuple(passes)


def _silent(step: Any) -> Any:
    """A pass as it runs where weights stay in files: no samples are written, and built-in text takes their place."""
    few = getattr(step, "stand_ins", 0)
    return replace(step, written=0, built_in=step.built_in or few) if few else step


def check_removes(passes: Sequence[Any]) -> None:
    """Refuse a pipeline that takes nothing away.

    Raises:
        ArgumentError: nothing in it selects, or nothing removes.
    """
    left = [stage for stage in ("select", "shrink") if not any(step.stage == stage for step in passes)]
    if left:
        what = f"no pass of it is of the stage {left[0]}, and nothing would go"
        raise ArgumentError(what, where="recipe", remedy="Add one; `fxprune recipes fast` prints a whole pipeline")


def reader_of(passes: Sequence[Any]) -> Any:
    """Return the pass that reads the samples; None where there is none."""
    from fxprune.data.calibration import Calibration

    return next((step for step in passes if Calibration in step.gives), None)


def most_samples(passes: Sequence[Any]) -> int | None:
    """Return how many samples of a text the pass that reads them takes; None for as many as there are."""
    reader = reader_of(passes)
    return getattr(reader, "samples", None) or getattr(reader, "built_in", None)


def samples_of(values: Mapping[str, Any], tokenizer: Any, most: int | None) -> Any:
    """Return the calibration samples of the text that was named, ``(samples, tokens)``; None where none was.

    Args:
        values: of the options of the command.
        tokenizer: of the model.
        most: samples; None for as many as there are.

    Raises:
        CalibrationError: the text is too short, or cannot be read.
    """
    file = values["calibration"]
    if file is None:
        return None
    from fxprune.data.text import calibration_text, calibration_windows

    text = calibration_text(file, tokenizer)
    return calibration_windows(tokenizer, text, most, values["tokens"] or TOKENS, str(file))


def _writes_tokenizer(values: Mapping[str, Any]) -> bool:
    """Whether the file that is written holds the tokenizer."""
    out = values["out"]
    return out is not None and out.suffix == ".gguf" and not is_gguf(values["model"])


def _unread(*_: Any) -> Any:
    """Stands for a tokenizer that is not read."""
    raise NotImplementedError
