"""Read calibration samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from fxprune.data.calibration import Calibration, spread
from fxprune.data.samples import check_kind, read_calibration, read_rows
from fxprune.data.text import check_tokenizer, offline_text, token_windows
from fxprune.errors import CalibrationError
from fxprune.graph.facts import Change, add_note, facts_of
from fxprune.pipeline.arguments import as_path, whole_number
from fxprune.pipeline.contract import Pass, PassResult

__all__ = ["CalibratePass"]

_BUILT_IN = (
    "calibrated on built-in text, the documentation of Python, for want of other samples; some hundred samples of text "
    "like what the model is to be used on, passed as calibration, do better"
)


@dataclass(frozen=True, eq=False)
class CalibratePass(Pass):
    """Reads and checks the samples that criteria and fits work on.

    Args:
        data: token ids ``(samples, tokens)``, a list of tokenised dicts, or a DataLoader.
        file: in place of ``data``, a file of JSON lines, each with ``input_ids`` and perhaps ``attention_mask`` and
            ``labels``.
        tokenizer: where there is neither, turns the built-in text, documentation of Python, into samples. It is English
            prose of one kind; text like what the model is to be used on does better.
        tokens: of a sample of the built-in text.
        samples: how many to take, evenly spread; None for all.
        built_in: the same of the built-in text alone, which has hundreds, and of a text that a command is given; None
            for all.
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

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense, and what turns no text into ids."""
        object.__setattr__(self, "tokens", whole_number("tokens", self.tokens, least=2))
        for name in ("samples", "built_in"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        check_tokenizer(self.tokenizer)

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
            windows = token_windows(self.tokenizer, offline_text(), self.tokens)
            few = min(filter(None, (self.samples, self.built_in)), default=None)
            data = windows[list(spread(range(len(windows)), few))]
            add_note(graph_module, _BUILT_IN)
        facts_of(graph_module).put(Calibration(spread(read_calibration(data, graph_module), self.samples)))
        return PassResult(graph_module, False)
