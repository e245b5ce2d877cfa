"""Importance: scores of all units."""

from .base import ImportancePass, Positions, axis_sums
from .block_influence import BlockInfluenceImportancePass
from .fisher import FisherImportancePass
from .forward import FlapImportancePass, ForwardImportancePass, Moments, WandaImportancePass
from .in_steps import ScoreInStepsPass
from .magnitude import L1ImportancePass, L2ImportancePass, LoadScoresPass, RandomImportancePass
from .reap import ReapImportancePass
from .reconstruction import ReconstructionImportancePass
from .taylor import TaylorImportancePass

__all__ = [
    "BlockInfluenceImportancePass",
    "FisherImportancePass",
    "FlapImportancePass",
    "ForwardImportancePass",
    "ImportancePass",
    "L1ImportancePass",
    "L2ImportancePass",
    "LoadScoresPass",
    "Moments",
    "Positions",
    "RandomImportancePass",
    "ReapImportancePass",
    "ReconstructionImportancePass",
    "ScoreInStepsPass",
    "TaylorImportancePass",
    "WandaImportancePass",
    "axis_sums",
]
