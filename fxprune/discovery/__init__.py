"""Discovery: solved axes, the dependency graph, and groups of units that are removed together."""
