"""Passes, tokenizer and samples of a prune, checked before any weight is read.

A dry run prepares as a prune does, so that both refuse the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import fxprune
from fxprune.cli.models import is_config_alone, load_samples, load_words, locate_model
from fxprune.errors import ArgumentError


@dataclass(frozen=True)
class CalibrationText:
    """The calibration text of a command, for a model of ``model_class`` where it is no causal language model.

    None stands for built-in text and for the defaults of the recipe.
    """

    source: str | None
    samples: int | None
    tokens: int | None
    model_class: Any = None

    @cached_property
    def needs_processor(self) -> bool:
        """Whether it is no text, but images, sounds or rows that the processor of the model reads."""
        from fxprune.data.processed import needs_processor

        return self.model_class is not None and self.source is not None and needs_processor(self.source)

    def check(self) -> None:
        """Refuse numbers without a text, and a text that cannot be read."""
        from fxprune.data.text import calibration_text

        if self.source is not None and not self.needs_processor:
            calibration_text(self.source)
        for option, value in (("--samples", self.samples), ("--tokens", self.tokens)):
            if self.source is None and value is not None:
                remedy = "Give --calibration, or leave it out"
                raise ArgumentError("applies to a calibration text, and there is none", where=option, remedy=remedy)

    def read(self, tokenizer: Any, most: int | None = None) -> Any:
        """The samples and their source, at most ``most`` unless a number was given; None if there is no text."""
        from fxprune.data.text import MOST_SAMPLES, TOKENS, text_samples

        if self.source is None:
            return None
        return text_samples(self.source, tokenizer, self.samples, self.tokens or TOKENS, most or MOST_SAMPLES)


@dataclass(frozen=True)
class Prepared:
    """Inputs of a prune besides the model.

    Args:
        processor: of a model that is no causal language model, saved beside the slim one.
        held_out: samples to compare dense and slim on, of such a model.
    """

    passes: tuple[Any, ...]
    tokenizer: Any
    samples: Any
    processor: Any = None
    held_out: tuple[Any, ...] = ()


def prepare(
    model: str,
    gguf_file: str | None,
    text: CalibrationText,
    options: Mapping[str, Any],
    *,
    needs_tokenizer: bool,
    dry_run: bool,
    needs_model: bool = False,
) -> Prepared:
    """Build the passes of a prune, and load tokenizer and samples; in a dry run a bare config needs no tokenizer.

    Without ``needs_model`` a recipe may end with a graph.
    """
    import torch

    from fxprune.checkpoint.read import load_processor
    from fxprune.data.samples import FileSamples
    from fxprune.recipes.recipe import needs_samples

    bare = fxprune.prune_pipeline(None, **options).passes  # only a file in the recipe gives these samples
    for stage in ("select", "shrink", *(["emit"] if needs_model else [])):
        if all(step.stage != stage for step in bare):
            remedy = "Add one; `fxprune recipes fast` prints a whole pipeline"
            raise ArgumentError(f"it has no pass of the stage {stage}", where="--recipe", remedy=remedy)
    built_in = reader_of(bare) is None and any(map(needs_samples, bare))
    kind = text.model_class
    if text.needs_processor:  # a fifth of ten samples or more are held out
        assert text.source is not None
        passes = fxprune.prune_pipeline((), **options).passes
        most = text.samples or getattr(reader_of(passes), "samples", None)
        every, processor = load_samples(text.source, model, None if most is None else most * 5 // 4)
        pruned_on, apart = _held_out(every)
        return Prepared(passes, None, pruned_on, processor, tuple(apart))
    if kind is not None and kind.main_input_name != "input_ids" and (built_in or text.source is not None):
        what = f"{kind.__name__} reads {kind.main_input_name}, and there are no samples of that"
        remedy = "Give --calibration with a folder of images or sounds, or rows in .jsonl; or --recipe llm-pruner"
        raise ArgumentError(what, where="--calibration", remedy=f"{remedy} --importance l2, by weights alone")
    wanted = built_in or text.source is not None or needs_tokenizer
    needed = wanted and not (dry_run and is_config_alone(model, gguf_file))
    instead = "; a prune by weights alone, as with --importance l2, needs none" if built_in else ""
    tokenizer = load_words(model, gguf_file, needed=needed, instead=instead)
    stand_in = tokenizer or (len if wanted else None)  # any callable: it is not called
    data = None if text.source is None else ()  # passes with data are not told apart by their samples
    passes = fxprune.prune_pipeline(data, tokenizer=stand_in, **options).passes
    reader = reader_of(passes)
    most = getattr(reader, "samples", None) or getattr(reader, "built_in", None)
    samples = None if tokenizer is None else text.read(tokenizer, most)
    for step in passes:
        if step is not reader or data is None:
            step.check_arguments()
    if kind is None:
        return Prepared(passes, tokenizer, samples)
    processor = load_processor(locate_model(model))
    decodes = "decoder_input_ids" in signature(kind.forward).parameters
    if decodes or samples is None:
        return Prepared(passes, tokenizer, samples, processor)
    rows, apart = _held_out(samples["input_ids"])
    kept = FileSamples(torch.stack(rows), samples.source, samples.text)
    return Prepared(passes, tokenizer, kept, processor, tuple({"input_ids": row[None]} for row in apart))


def _held_out(samples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The samples to prune on, and those held out: every fifth if there are enough."""
    if len(samples) < 10:
        return list(samples), []
    return [one for i, one in enumerate(samples) if i % 5], list(samples[::5])


def reader_of(passes: Sequence[Any]) -> Any:
    """The pass that reads the samples; None if there is none."""
    from fxprune.data.calibration import Calibration

    return next((step for step in passes if Calibration in step.gives), None)
