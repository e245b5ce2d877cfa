"""Discovery: from a traced graph to groups."""

from .find_groups import FindGroupsPass

__all__ = ["FindGroupsPass"]
