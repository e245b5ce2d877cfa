"""Weights beyond one memory: files, prefetch to a compute device, several processes."""
