"""Pictures of the dependency graph, as Graphviz text, images and HTML pages."""
