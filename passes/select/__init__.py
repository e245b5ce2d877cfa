"""Selection: how many units go from each group, and which."""

from .by_gates import SelectByGatesPass
from .plan_from_json import PlanFromJsonPass
from .ratio import SelectByGroupRatioPass, SelectByRatioPass
from .search import SelectBySearchPass

__all__ = ["PlanFromJsonPass", "SelectByGatesPass", "SelectByGroupRatioPass", "SelectByRatioPass", "SelectBySearchPass"]
