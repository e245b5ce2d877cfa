"""Selection: how many units go from each group, and which."""

from passes.select.group_ratio import SelectByGroupRatioPass
from passes.select.ratio import SelectByRatioPass

__all__ = ["SelectByGroupRatioPass", "SelectByRatioPass"]
