"""Weights and sums past one memory: files, prefetch to a compute device, several processes."""
