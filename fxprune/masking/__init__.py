"""Masked runs: structures zeroed instead of removed, and the comparison of two runs."""
