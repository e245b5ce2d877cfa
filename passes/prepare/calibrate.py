"""Read calibration samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from fxprune.data.calibration import Calibration
from fxprune.data.samples import check_kind, read_calibration, read_rows
from fxprune.errors import CalibrationError
from fxprune.graph.facts import Change, facts_of
from fxprune.pipeline.arguments import as_path
from fxprune.pipeline.contract import Pass, PassResult

__all__ = ["CalibratePass"]


@dataclass(frozen=True, eq=False)
class CalibratePass(Pass):
    """Reads and checks the samples that criteria and fits work on.

    Args:
        data: token ids ``(samples, tokens)``, a list of tokenised dicts, or a DataLoader.
        file: in place of ``data``, a file of JSON lines, each with ``input_ids`` and perhaps ``attention_mask`` and
            ``labels``.
    """

    name: ClassVar[str] = "calibrate"
    stage: ClassVar[str] = "prepare"
    changes: ClassVar[Change] = "nothing"
    gives: ClassVar[tuple[type[Calibration], ...]] = (Calibration,)

    data: Any = field(default=None, metadata={"spelled": False})
    file: str = ""

    def check_arguments(self) -> None:
        """Raise where there is nothing to read.

        Raises:
            CalibrationError: there is neither data nor a file, or the data is of a kind that holds no samples.
        """
        if self.data is not None:
            check_kind(self.data)
        elif not self.file:
            raise CalibrationError(
                "no data", where=f"pass {self.name}", remedy="Pass data, or file with the path of JSON lines"
            )
        else:
            as_path("file", self.file)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the samples.

        Raises:
            CalibrationError: there are none, or they do not fit the model.
        """
        data = self.data if self.data is not None else read_rows(self.file)
        facts_of(graph_module).put(Calibration(read_calibration(data, graph_module)))
        return PassResult(graph_module, False)
