"""Write docs/rules.md, a line for every op that has a rule: `python -m tests.rules.page`."""

from pathlib import Path

from fxprune.rules import Values, registered_rules
from tests.rules.samples import Applied, samples

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"

INTRODUCTION = """# Rules

Written by `python -m tests.rules.page`: the rule of each op, applied to one call. Axes with one letter are one axis;
`(h * d)` is an axis of `h` times `d` units, `[a | b]` one of `a` and then `b`, `1` one that broadcasts. Units may be
removed unless they are listed as kept. An op that torch itself marks as pointwise needs no rule of its own; any other
op without a rule keeps all units of its axes.

- `sums i`: multiplies, and sums over `i`; units that are zero in one factor can be removed.
- `i by indices`: the numbers in `indices` pick units of `i`, which are kept unless the numbers are positions that an op
  computed.
- `statistic over i`: computes another number over fewer units.
- `shares out i`: as in a softmax; the axis keeps its units unless they are experts.
- `positions of i in out`: the numbers are positions along `i`.
- `keeps i: reason`: no unit of `i` can be removed.
"""

HEADINGS = {
    Values.MOVED: "Values are moved",
    Values.PICKED: "Values are picked",
    Values.CAST: "Values are cast",
    Values.POINTWISE: "Each element by itself",
    Values.COMPARED: "Comparisons",
    Values.PRODUCT: "Products and sums of products",
    Values.REDUCED: "Zeros stay zeros",
    Values.SHAPE: "Shapes alone are read",
    None: "Other ops",
}


def page() -> str:
    """The text of the page."""
    rules, calls = registered_rules(), samples()
    parts = [INTRODUCTION]
    for values, heading in HEADINGS.items():
        names = [name for name, found in calls.items() if found and rules[name].values is values]
        names.sort(key=lambda name: name.partition("::")[2])
        lines = [_line(name.partition("::")[2], Applied(calls[name][0]).text) for name in names]
        parts.append("\n".join((f"## {heading}", "", "```text", *lines, "```", "")))
    return "\n".join(parts)


def _line(name: str, text: str) -> str:
    return "  ".join((name, *text.split("  ")[1:]))


if __name__ == "__main__":
    PAGE.write_text(page())
