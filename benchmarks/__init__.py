"""Measurements of fxprune: quality, speed and coverage, runnable offline."""
