"""Pictures of the dependency graph: Graphviz text, what Graphviz draws of it, and pages in HTML."""
