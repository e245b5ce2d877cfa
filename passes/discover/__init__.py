"""Discovery: from a traced graph to groups."""

from passes.discover.find_groups import FindGroupsPass

__all__ = ["FindGroupsPass"]
