"""Estimation: what each unit is worth."""

from .block_influence import BlockInfluenceImportancePass
from .fisher import FisherImportancePass
from .forward import FlapImportancePass, WandaImportancePass
from .in_steps import ScoreInStepsPass
from .magnitude import L1ImportancePass, L2ImportancePass, LoadScoresPass, RandomImportancePass
from .reap import ReapImportancePass
from .reconstruction import ReconstructionImportancePass
from .taylor import TaylorImportancePass

__all__ = [
    "BlockInfluenceImportancePass",
    "FisherImportancePass",
    "FlapImportancePass",
    "L1ImportancePass",
    "L2ImportancePass",
    "LoadScoresPass",
    "RandomImportancePass",
    "ReapImportancePass",
    "ReconstructionImportancePass",
    "ScoreInStepsPass",
    "TaylorImportancePass",
    "WandaImportancePass",
]
