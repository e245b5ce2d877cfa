"""The report of a prune: numbers, charts and an HTML page."""
