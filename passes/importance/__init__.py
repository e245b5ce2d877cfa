"""Importance: scores of all units."""

from .base import ImportancePass, Positions, axis_sums
from .fisher import FisherImportancePass
from .forward import FlapImportancePass, ForwardImportancePass, Moments, WandaImportancePass
from .in_steps import ChooseScoresPass, ScoreInStepsPass
from .magnitude import L1ImportancePass, L2ImportancePass, LoadScoresPass, RandomImportancePass
from .reconstruction import ReconstructionImportancePass
from .structures import BlockInfluenceImportancePass, ReapImportancePass
from .taylor import TaylorImportancePass

__all__ = [
    "BlockInfluenceImportancePass",
    "ChooseScoresPass",
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
