"""Importance: scores of all units."""

from .base import ImportancePass as ImportancePass
from .base import L1ImportancePass as L1ImportancePass
from .base import L2ImportancePass as L2ImportancePass
from .base import LoadScoresPass as LoadScoresPass
from .base import Positions as Positions
from .base import RandomImportancePass as RandomImportancePass
from .base import axis_sums as axis_sums
from .forward import BlockInfluenceImportancePass as BlockInfluenceImportancePass
from .forward import FlapImportancePass as FlapImportancePass
from .forward import ForwardImportancePass as ForwardImportancePass
from .forward import Moments as Moments
from .forward import ReapImportancePass as ReapImportancePass
from .forward import WandaImportancePass as WandaImportancePass
from .in_steps import MultiplyScoresPass as MultiplyScoresPass
from .in_steps import ScoreInStepsPass as ScoreInStepsPass
from .reconstruction import ReconstructionImportancePass as ReconstructionImportancePass
from .taylor import FisherImportancePass as FisherImportancePass
from .taylor import TaylorImportancePass as TaylorImportancePass
