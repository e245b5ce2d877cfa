"""Perplexity for the benchmarks: the package's own, under the name that benchmarks know."""

from __future__ import annotations

from fxprune.evaluation import logits_of, perplexity

__all__ = ["logits_of", "perplexity"]
