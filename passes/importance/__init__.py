"""Estimation: what each unit is worth."""

from .load_scores import LoadScoresPass
from .magnitude import L1ImportancePass, L2ImportancePass
from .randomly import RandomImportancePass
from .taylor import TaylorImportancePass

__all__ = ["L1ImportancePass", "L2ImportancePass", "LoadScoresPass", "RandomImportancePass", "TaylorImportancePass"]
