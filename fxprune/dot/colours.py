"""Colours of a picture: one hue for each kind of unit, the same in every picture."""

from __future__ import annotations

import colorsys

__all__ = ["FROZEN", "LINE", "WHITE", "hue_of"]

FROZEN = "#d0d0d0"
WHITE = "#ffffff"
LINE = "#8a8a8a"

_HUES = {
    "channel": 0.58,
    "mlp": 0.08,
    "head": 0.36,
    "query_head": 0.36,
    "kv_head": 0.92,
    "head_dim": 0.75,
    "expert": 0.15,
    "layer": 0.48,
}
_SHADES = 3
"""Lightnesses of one hue, for groups of one kind in one block."""


def hue_of(kind: str, shade: int = 0, strong: bool = False) -> str:
    """Return the colour of units of ``kind``, as ``#rrggbb``.

    Args:
        kind: what a unit is, as :meth:`fxprune.dot.words.Words.kind` has it.
        shade: which of several groups of this kind in one block it is.
        strong: dark, for a line; else light, for a box that is written on.
    """
    step = shade % _SHADES
    lightness = 0.45 - 0.08 * step if strong else 0.85 - 0.09 * step
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(_HUES[kind], lightness, 0.65))
    return f"#{red:02x}{green:02x}{blue:02x}"
