"""Calibration: samples read for the passes that follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.data.built_in import built_in_samples, can_write, general_samples, own_samples
from fxprune.data.calibration import Calibration, embedding_rows, plain_tokens, spread, token_input
from fxprune.data.samples import check_kind, read_calibration, read_rows
from fxprune.data.text import check_tokenizer
from fxprune.errors import CalibrationError
from fxprune.graph.context import Refusal, attempt
from fxprune.graph.facts import Change, Source, add_note, facts_of
from fxprune.graph.tensors import require_weights
from fxprune.offload.files import is_shelved
from fxprune.pipeline.arguments import as_path, as_seed, whole_number
from fxprune.pipeline.contract import Pass, PassResult, Track, check_track, no_progress

__all__ = ["CalibratePass"]

_FOR_WANT = (
    "for want of other samples; some hundred samples of text like what the model is to be used on, passed as "
    "calibration, do better"
)
_BUILT_IN = f"calibrated on built-in text, {_FOR_WANT}"


def _of_text(samples: int) -> int:
    """How many of samples that stand in for others are of built-in text, if it has as many: two in three."""
    return 2 * samples // 3


@dataclass(frozen=True, eq=False)
class CalibratePass(Pass):
    """Reads and checks the samples that criteria and fits work on.

    Args:
        data: token ids ``(samples, tokens)``, a list of tokenised dicts, or a DataLoader.
        file: in place of ``data``, a file of JSON lines, each with ``input_ids`` and perhaps ``attention_mask`` and
            ``labels``.
        tokenizer: where there is neither, turns the built-in text into samples: English of many kinds and chats, 250
            samples of 128 tokens or more, then documentation of Python. Text like what the model is to be used on does
            better.
        tokens: of a sample of the built-in text, or of one that the model writes.
        samples: how many to take, evenly spread; None for all.
        built_in: the same of the built-in text alone, which has hundreds, and of a text that a command is given; None
            for all.
        written: samples in place of the built-in text alone. Two in three are of its general part, as far as that goes;
            the others the model writes itself, text of all the kinds that it knows. A model that cannot write, or whose
            weights stay in files, has the built-in text.
        seed: for what the model writes.
        track: shows progress, as ``track(items, what, total)``.
    """

    name: ClassVar[str] = "calibrate"
    stage: ClassVar[str] = "prepare"
    changes: ClassVar[Change] = "nothing"
    gives: ClassVar[tuple[type[Calibration], ...]] = (Calibration,)

    data: Any = field(default=None, metadata={"spelled": False})
    file: str = ""
    tokenizer: Any = field(default=None, metadata={"spelled": False})
    tokens: int = 128
    samples: int | None = None
    built_in: int | None = None
    written: int = 0
    seed: int = 0
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense, and what turns no text into ids."""
        object.__setattr__(self, "tokens", whole_number("tokens", self.tokens, least=2))
        for name in ("samples", "built_in"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        object.__setattr__(self, "written", whole_number("written", self.written, least=0))
        object.__setattr__(self, "seed", as_seed("seed", self.seed))
        check_tokenizer(self.tokenizer)
        check_track(self.track)

    @property
    def stand_ins(self) -> int:
        """Return how many samples take the place of others, some written by the model: none where there are others."""
        given = self.data is not None or self.file
        return 0 if given else min(self.written, self.samples or self.written)

    @property
    def to_write(self) -> int:
        """Return about how many of these the model is to write, by the length of the built-in text."""
        return self.stand_ins - min(_of_text(self.stand_ins), general_samples(self.tokens))

    def check_arguments(self) -> None:
        """Raise where there is nothing to read.

        Raises:
            CalibrationError: there is neither data nor a file, or the data is of a kind that holds no samples.
        """
        if self.data is not None:
            check_kind(self.data)
        elif self.file:
            as_path("file", self.file)
        elif self.tokenizer is None:
            raise CalibrationError(
                "no data",
                where=f"pass {self.name}",
                remedy="Pass data, file with the path of JSON lines, or a tokenizer for the built-in text",
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the samples.

        Raises:
            CalibrationError: there are none, or they do not fit the model.
        """
        if self.data is not None or self.file:
            data = self.data if self.data is not None else read_rows(self.file)
        else:
            data = self._stand_in(graph_module)
        facts_of(graph_module).put(Calibration(spread(read_calibration(data, graph_module), self.samples)))
        return PassResult(graph_module, False)

    def _stand_in(self, graph_module: fx.GraphModule) -> torch.Tensor:
        """Samples for want of any: what the model writes beside built-in text, else that text alone."""

        def built_in(count: int | None) -> torch.Tensor:
            return built_in_samples(self.tokenizer, self.tokens, count)

        if not self.stand_ins:
            add_note(graph_module, _BUILT_IN)
            return built_in(min(filter(None, (self.samples, self.built_in)), default=None))
        text = built_in_samples(self.tokenizer, self.tokens, _of_text(self.stand_ins), beyond=False)
        written = self._written(graph_module, self.stand_ins - len(text))
        if isinstance(written, str):
            add_note(graph_module, f"{_BUILT_IN} ({written})")
            return built_in(min(self.stand_ins, self.built_in or self.stand_ins))
        told = f"{len(written):,} samples that the model wrote itself, and {len(text):,} of built-in text"
        add_note(graph_module, f"calibrated on {told}, {_FOR_WANT}")
        samples = torch.cat([text, written])
        return samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(self.seed))]

    def _written(self, graph_module: fx.GraphModule, count: int) -> torch.Tensor | str:
        """What the model writes, or why it writes nothing."""
        source, name = facts_of(graph_module).get(Source), token_input(graph_module)
        if source is None or name is None or not can_write(source.model):
            return "the model writes no text"
        if is_shelved():
            return "the weights are in files, and each token that is written would read them all"
        require_weights(graph_module, self.name)
        rows = embedding_rows(graph_module)[name]
        vocabulary = plain_tokens(self.tokenizer, rows)
        vocabulary = vocabulary if len(vocabulary) else torch.arange(rows)
        found = attempt(
            own_samples, source.model, self.tokenizer, vocabulary, count, self.tokens, self.seed, self.track
        )
        return f"the model wrote none: {found}" if isinstance(found, Refusal) else found
