"""Importance: scores of all units."""

from .base import (
    ImportancePass,
    L1ImportancePass,
    L2ImportancePass,
    LoadScoresPass,
    Positions,
    RandomImportancePass,
    axis_sums,
)
from .forward import (
    BlockInfluenceImportancePass,
    FlapImportancePass,
    ForwardImportancePass,
    Moments,
    ReapImportancePass,
    WandaImportancePass,
)
from .in_steps import ChooseScoresPass, ScoreInStepsPass
from .reconstruction import ReconstructionImportancePass
from .taylor import FisherImportancePass, TaylorImportancePass

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
