"""Structures zeroed in place instead of removed, and the comparison of two runs."""
