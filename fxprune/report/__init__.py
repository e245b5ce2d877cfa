"""The report of a prune, and its HTML page."""
