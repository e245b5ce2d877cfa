"""Colours tell kinds apart by hue, and groups of one kind by lightness."""

from __future__ import annotations

import colorsys
import itertools

from fxprune.discovery.groups import KINDS
from fxprune.draw.graphviz import hue_of


def test_each_kind_has_a_hue_of_its_own_in_every_shade() -> None:
    hues = {}
    for kind in (*KINDS, "kv_head"):
        shades = [hue_of(kind, shade, strong) for shade in range(3) for strong in (False, True)]
        assert len(set(shades)) == len(shades)
        channels = ([int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)] for shade in shades)
        found = [colorsys.rgb_to_hls(*rgb)[0] for rgb in channels]
        assert max(found) - min(found) < 0.02
        hues[kind] = found[0]
    ordered = sorted(hues.values())
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 0.05
    assert hue_of("head") == hue_of("query_head") != hue_of("kv_head")
