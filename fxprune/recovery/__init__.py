"""Recovery of what pruning took: low-rank updates of the pruned projections, trained a little and merged."""

from typing import TYPE_CHECKING

from fxprune.data.rows import BadRow
from fxprune.pipeline.later import later

if TYPE_CHECKING:
    from fxprune.recovery.data import DataReport
    from fxprune.recovery.distil import Distillation
    from fxprune.recovery.lora import Targets
    from fxprune.recovery.run import Recovery, recover
    from fxprune.recovery.settings import RecoverySettings

__all__ = ["BadRow", "DataReport", "Distillation", "Recovery", "RecoverySettings", "Targets", "recover"]

__getattr__ = later(
    __name__,
    {
        "DataReport": "data",
        "Distillation": "distil",
        "Recovery": "run",
        "RecoverySettings": "settings",
        "Targets": "lora",
        "recover": "run",
    },
)
