"""Engines that run a model, behind one interface that `benchmarks.latency` times."""
