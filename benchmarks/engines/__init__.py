"""Slim models in serving engines, each in an environment of its own: on request, as these take gigabytes."""

from __future__ import annotations

__all__: list[str] = []
