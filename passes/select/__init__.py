"""Selection: how many units go from each group, and which."""

from .group_ratio import SelectByGroupRatioPass
from .plan_from_json import PlanFromJsonPass
from .ratio import SelectByRatioPass

__all__ = ["PlanFromJsonPass", "SelectByGroupRatioPass", "SelectByRatioPass"]
