"""Modules whose graph is easily something else than the module: by dtype, by size, by state and by gradients."""
