"""Selection: how many units go from each group, and which."""

from .by_gates import SelectByGatesPass
from .group_ratio import SelectByGroupRatioPass
from .plan_from_json import PlanFromJsonPass
from .ratio import SelectByRatioPass
from .search import SelectBySearchPass

__all__ = ["PlanFromJsonPass", "SelectByGatesPass", "SelectByGroupRatioPass", "SelectByRatioPass", "SelectBySearchPass"]
