"""What depends on what: axes solved, the dependency graph, and the groups that are removed together."""
