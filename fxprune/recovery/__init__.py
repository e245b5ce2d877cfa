"""Recovery of lost quality: low-rank updates of the pruned projections, trained briefly and merged."""

from fxprune.data.rows import BadRow
from fxprune.recovery.data import DataReport, RecoverySettings
from fxprune.recovery.lora import Targets
from fxprune.recovery.run import Recovery, recover
from fxprune.recovery.train import Distillation

__all__ = ["BadRow", "DataReport", "Distillation", "Recovery", "RecoverySettings", "Targets", "recover"]
