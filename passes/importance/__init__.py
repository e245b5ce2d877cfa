"""Estimation: what each unit is worth."""

from passes.importance.magnitude import L1ImportancePass, L2ImportancePass
from passes.importance.randomly import RandomImportancePass
from passes.importance.taylor import TaylorImportancePass

__all__ = ["L1ImportancePass", "L2ImportancePass", "RandomImportancePass", "TaylorImportancePass"]
