"""Latency, memory and size of slim models, engine by engine, beside the ideal by their sizes."""
