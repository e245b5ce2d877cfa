"""Selection: how many units go from each group, and which."""

from .base import PlanFromJsonPass as PlanFromJsonPass
from .ratio import SelectByGroupRatioPass as SelectByGroupRatioPass
from .ratio import SelectByRatioPass as SelectByRatioPass
