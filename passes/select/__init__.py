"""Selection: how many units go from each group, and which."""

from .base import PlanFromJsonPass
from .ratio import SelectByGroupRatioPass, SelectByRatioPass
from .search import SelectByGatesPass, SelectBySearchPass

__all__ = ["PlanFromJsonPass", "SelectByGatesPass", "SelectByGroupRatioPass", "SelectByRatioPass", "SelectBySearchPass"]
