"""The report of a prune in numbers, as plain data, as a table and as one HTML page."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from rich.table import Table

from fxprune.axes import Keep
from fxprune.data.calibration import Calibration
from fxprune.discovery.groups import Group
from fxprune.errors import ArgumentError
from fxprune.graph.context import wrap_errors
from fxprune.graph.facts import Fact
from fxprune.graph.tensors import starred
from fxprune.removal.removal import Scores
from fxprune.removal.target import Reached
from fxprune.report.charts import ChartColumn, bar_chart, box_chart
from fxprune.report.quality import Quality

_PACKAGES = ("fxprune", "torch", "transformers", "safetensors")

_UNITS = {
    "mlp": "MLP channels",
    "head": "attention heads",
    "conv": "channels of convolutions",
    "channel": "channels of the residual stream",
    "head_dim": "channels of heads",
    "expert": "experts",
    "layer": "layers",
}
"""Names of the units of each kind."""

_NESTED_UNITS = {"head": "query heads of each key/value head", "head_dim": "channels of each head"}
"""Names of units that are counted inside a unit of another group."""

_DECISIVE = {"importance": "Scored by", "select": "chosen by", "compensate": "fitted by", "tune": "tuned by"}
"""Stages that decide which units are removed and how the others change, in words."""


@cache
def _page() -> Template:
    pages = Environment(
        loader=PackageLoader("fxprune.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("page.html")


@dataclass(frozen=True)
class GroupSize:
    """A group with its number of units before and after.

    Args:
        block: module path of the block it lies in; None if it spans several.
        place: the label it is shown with: its own name, or block and kind if the block has many such groups.
        nested: whether units are counted inside each unit of another group, as query heads of a key/value head are.
    """

    name: str
    kind: str
    block: str | None
    place: str
    before: int
    after: int
    nested: bool = False


@dataclass(frozen=True)
class Spread:
    """Minimum, quartiles and maximum of the scores of kept and of removed units; empty if there are none."""

    kept: tuple[float, ...] = ()
    removed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Headline:
    """A size of the model, dense and slim."""

    name: str
    dense: int
    slim: int

    @property
    def left(self) -> float:
        """The fraction that is left."""
        return self.slim / self.dense if self.dense else 1.0


@dataclass(frozen=True)
class SamplesUsed:
    """Calibration samples that a prune used.

    Args:
        source: the name of a file, or words.
        written: number of samples that the model wrote itself.
        tokens: of all samples.
        lengths: tokens of the shortest sample and of the longest.
    """

    source: str
    samples: int
    written: int
    tokens: int
    lengths: tuple[int, int]

    @classmethod
    def of(cls, calibration: Calibration) -> SamplesUsed:
        """The samples of a graph."""
        lengths = [sample.labels.shape[1] for sample in calibration.samples]
        ends = min(lengths), max(lengths)
        return cls(calibration.source, len(lengths), calibration.written, sum(lengths), ends)

    def __str__(self) -> str:
        least, most = self.lengths
        each = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        own = f", {self.written:,} of them written by the model" if self.written else ""
        tokens = f", {self.tokens:,} tokens, {each} each" if self.tokens else ""
        return f"{self.source}: {self.samples:,} samples{own}{tokens}"


@dataclass(frozen=True)
class KindSummary:
    """Sizes of all groups of a kind.

    Args:
        name: the kind, with a number if a block has several such groups.
        shrunk: number of groups that lost units.
        least: the smallest fraction kept of a group.
        chart: the units of each block; empty if none lost any.
        runs: the same in words, equal neighbouring blocks together.
        scores: chart of the scores; empty if there are none.
    """

    kind: str
    name: str
    units: str
    groups: int
    shrunk: int
    before: int
    after: int
    least: float
    chart: Markup
    runs: tuple[str, ...]
    scores: Markup


def package_versions() -> dict[str, str]:
    """The versions of the packages that a result depends on."""
    return {name: version(name) for name in _PACKAGES}


@dataclass(frozen=True)
class Report(Fact):
    """A prune in numbers, before and after.

    Args:
        ratio: requested fraction of parameters to remove; None if a group ratio or a plan was given.
        group_ratio: requested fraction of units to remove, or None.
        reached: what became of the target; None if there was none.
        parameters: number of parameters, dense and slim.
        macs: multiply-accumulates of one sample of ``tokens`` tokens, dense and slim.
        tokens: the sequence length of ``macs``.
        widths: for each group that shrank, ``{group name: (units before, units after)}``.
        renormalised: of these, the groups that a norm or another statistic runs over, with its nodes: removing such
            units equals zeroing them only up to that statistic, which is then taken over the kept units.
        removed_blocks: blocks that were removed as a whole.
        frozen: for each parameter axis that must keep its units, ``{"name[axis]": reason}``.
        verification_error: largest difference between slim and masked dense outputs, relative to the largest output
            or 1; None if it was not checked.
        fidelity: largest difference between the dense graph and the module it was traced from, relative to the largest
            output; None if it was not checked, as on ``meta``.
        gradient_fidelity: the same for the gradients of the parameters; None if there are none.
        model_reasons: why there is no slim Hugging Face model; empty if there is one.
        model: name of the dense model, and its class.
        memory: bytes of the parameters, dense and slim.
        cache: bytes of keys and values per token in half precision, dense and slim; None without attention.
        scores: for each scored place of ``groups`` the spread of its scores.
        criterion: the spelling of the pass that made the scores.
        kept_norms: modules whose norm lost units and was rescaled to equal masking.
        passes: the passes that ran, each with its stage, its spelling and its seconds.
        quality: quality of the slim model beside the dense one; None if it was not measured.
        unmeasured: why it was not.
        measured: quality and speed if they were measured, in rows of text; the first row names the columns.
        vocabulary: tokens, dense and slim; None if all stay.
        picture: one layer of the slim model as SVG; not part of the plain data.
    """

    parameters: tuple[int, int]
    macs: tuple[int, int]
    tokens: int
    ratio: float | None = None
    group_ratio: float | None = None
    reached: Reached | None = None
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    renormalised: dict[str, tuple[str, ...]] = field(default_factory=dict)
    removed_blocks: tuple[str, ...] = ()
    frozen: dict[str, str] = field(default_factory=dict)
    verification_error: float | None = None
    fidelity: float | None = None
    gradient_fidelity: float | None = None
    model_reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    model: str = ""
    memory: tuple[int, int] | None = None
    cache: tuple[int, int] | None = None
    groups: tuple[GroupSize, ...] = ()
    scores: Mapping[str, Spread] = field(default_factory=dict)
    criterion: str = ""
    kept_norms: tuple[str, ...] = ()
    passes: tuple[tuple[str, str, float], ...] = field(default=(), compare=False)
    versions: Mapping[str, str] = field(default_factory=package_versions)
    calibration: SamplesUsed | None = None
    quality: Quality | None = None
    unmeasured: str = ""
    measured: tuple[tuple[str, ...], ...] = ()
    vocabulary: tuple[int, int] | None = None
    picture: str = field(default="", repr=False, compare=False)

    @property
    def achieved(self) -> float:
        """Fraction of parameters that were removed."""
        dense, slim = self.parameters
        return 1 - slim / dense

    def with_quality(self, quality: Quality | None, unmeasured: str = "") -> Report:
        """The report with a quality and its notes, or with the reason why there is none."""
        notes = () if quality is None else quality.notes
        every = tuple(dict.fromkeys((*self.notes, *notes)))
        return dataclasses.replace(self, quality=quality, unmeasured=unmeasured, notes=every)

    def headlines(self) -> tuple[Headline, ...]:
        """The sizes that a reader asks for first."""
        work = f"MACs at {self.tokens} tokens" if self.tokens else "MACs of a sample"
        sizes: dict[str, tuple[int, int] | None] = {
            "parameters": self.parameters,
            work: self.macs,
            "bytes of weights": self.memory,
            "KV-cache, bytes a token": self.cache,
            "tokens of the vocabulary": self.vocabulary,
        }
        return tuple(Headline(name, *size) for name, size in sizes.items() if size is not None)

    @property
    def quality_rows(self) -> tuple[tuple[str, ...], ...]:
        """Rows of the table of quality, the first with the names of the columns; none if nothing was measured."""
        if self.measured or self.quality is None:
            return self.measured
        return (("", "dense", "slim"), *self.quality.rows())

    @property
    def advice(self) -> str:
        """Remedies for a result that is far from the dense model; empty if it is not far, or not known."""
        if self.quality is None or not self.quality.is_far:
            return ""
        tuned = (spelling for stage, spelling, _ in self.passes if stage == "tune")
        given = self.calibration is not None and not self.calibration.source.startswith("built-in")
        remedies = ["more calibration text" if given else "calibration text like that of the intended use"]
        remedies += [] if any("weights" in spelling for spelling in tuned) else ["the recipe `best`"]
        remedies += ["a smaller ratio", "training, as by `fxprune recover`"]
        return f"far from the dense model; try {', '.join(remedies[:-1])} or {remedies[-1]}"

    def kinds(self) -> Iterator[KindSummary]:
        """Yield a summary of each kind of groups; of several such groups in a block, one summary for each."""
        series: dict[tuple[str, str], list[GroupSize]] = {}
        for group in sorted(self.groups, key=lambda group: list(_UNITS).index(group.kind)):
            series.setdefault((group.kind, group.place.rpartition("/")[2]), []).append(group)
        for (kind, name), groups in series.items():
            yield _summarize(kind, name, groups, self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        data = dataclasses.asdict(self) | {"achieved": self.achieved}
        del data["picture"]
        return data

    def to_json(self) -> str:
        """Everything as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report from the output of :meth:`to_dict`, or from a JSON document of it.

        Raises:
            ArgumentError: it is something else.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        with wrap_errors("report", "Pass what Report.to_dict returned", ArgumentError):
            values = {name: _as_tuples(value) for name, value in data.items() if name in known}
            if values.get("quality") is not None:
                values["quality"] = Quality.from_dict(values["quality"])
            made: dict[str, Any] = {"calibration": SamplesUsed, "reached": Reached}
            values |= {name: made[name](**values[name]) for name in made if values.get(name) is not None}
            values["groups"] = tuple(GroupSize(**size) for size in values.get("groups", ()))
            values["scores"] = {place: Spread(**spread) for place, spread in values.get("scores", {}).items()}
            return cls(**values)

    def to_html(self) -> str:
        """Everything as one self-contained HTML page."""
        statistics = {}
        for group, nodes in self.renormalised.items():
            names = dict.fromkeys(re.sub(r"_\d+$", "", node) for node in nodes)
            statistics[group] = f"a statistic runs over it: {', '.join(names)}"
        return _page().render(
            report=self,
            frozen=_by_reason(self.frozen),
            renormalised=_by_reason(statistics),
            kept_norms=Counter(map(starred, self.kept_norms)),
            decided=[(_DECISIVE[stage], spelling) for stage, spelling, _ in self.passes if stage in _DECISIVE],
        )

    def table(self) -> Table:
        """Dense against slim as a table for a terminal."""
        table = Table("", "dense", "slim", "change", title="fxprune")
        for size in self.headlines():
            table.add_row(size.name, f"{size.dense:,}", f"{size.slim:,}", f"{size.left - 1:+.1%}")
        return table


def _as_tuples(value: Any) -> Any:
    """Plain data with tuples for lists: JSON has no tuples."""
    if isinstance(value, Mapping):
        return {name: _as_tuples(item) for name, item in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _by_reason(reasons: Mapping[str, str]) -> dict[str, Counter[str]]:
    """Group names by reason, with ``*`` for numbers of blocks and the count of names that then agree."""
    found: dict[str, Counter[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(re.sub(r" \(at \w+\)$", "", reason), Counter())[starred(name)] += 1
    return found


def _summarize(kind: str, name: str, groups: Sequence[GroupSize], scores: Mapping[str, Spread]) -> KindSummary:
    labels: dict[str, str] = {}  # the number of the block, by place
    before, after = (Counter[str](), Counter[str]())
    for group in groups:
        labels[group.place] = group.block.rpartition(".")[2] if group.block else "all"
        before[group.place] += group.before
        after[group.place] += group.after
    shrunk = sum(group.after < group.before for group in groups)
    columns = [
        ChartColumn(label, f"{place}: {after[place]:,} of {before[place]:,} left ({after[place] / before[place]:.0%})")
        for place, label in labels.items()
    ]
    runs = []  # of equal neighbouring blocks
    for (dense, slim), run in groupby(labels, key=lambda place: (before[place], after[place])):
        names = [labels[place] for place in run]
        where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        runs.append(f"{where}: {dense:,}" if dense == slim else f"{where}: {dense:,} \N{RIGHTWARDS ARROW} {slim:,}")
    several = len(labels) > 1  # a chart of one bar says less than the line of text
    return KindSummary(
        kind=kind,
        name=name,
        units=_NESTED_UNITS.get(kind, _UNITS[kind]) if groups[0].nested else _UNITS[kind],
        groups=len(groups),
        shrunk=shrunk,
        before=before.total(),
        after=after.total(),
        least=min(group.after / group.before for group in groups),
        chart=bar_chart(columns, list(before.values()), list(after.values())) if shrunk and several else Markup(),
        runs=tuple(runs),
        scores=_score_chart(labels, scores) if shrunk else Markup(),
    )


def _score_chart(labels: Mapping[str, str], scores: Mapping[str, Spread]) -> Markup:
    """Draw the spread of the scores by place; nothing unless a place has both kept and removed units."""
    places = [place for place in labels if place in scores]
    kept, removed = ([getattr(scores[place], side) for place in places] for side in ("kept", "removed"))
    if not any(map(all, zip(kept, removed, strict=True))):
        return Markup()
    columns = []
    for place, *sides in zip(places, kept, removed, strict=True):
        stays, went = (f"{five[2]:.3g}" if five else "none" for five in sides)
        columns.append(ChartColumn(labels[place], f"{place}: median kept {stays}, removed {went}"))
    return box_chart(columns, kept, removed)


def group_widths(groups: tuple[Group, ...], keep: Keep) -> dict[str, tuple[int, int]]:
    """The units, before and after, of the groups that shrank."""
    shrunk = ((one, one.factor) for one in groups if one.factor is not None and keep.touches(one.factor))
    return {group.name: (group.size, keep.count(factor)) for group, factor in shrunk}


def group_sizes(groups: Sequence[Group], keep: Keep, removed_blocks: Sequence[str]) -> tuple[GroupSize, ...]:
    """Every group with its units before and after; a removed block keeps none."""
    alike = Counter((group.block, group.kind) for group in groups)
    found = []
    for group in groups:
        after = 0 if group.block in removed_blocks else 1 if group.factor is None else keep.count(group.factor)
        many = group.block is not None and alike[group.block, group.kind] > 4  # one per expert is too many
        place = f"{group.block}/{group.kind}" if many else group.name
        nested = group.outer is not None
        found.append(GroupSize(group.name, group.kind, group.block, place, group.size, after, nested))
    return tuple(found)


def score_spreads(
    groups: Sequence[Group], sizes: Sequence[GroupSize], keep: Keep, scores: Scores | None
) -> dict[str, Spread]:
    """The spread of the scores of kept and of removed units, by place; ``sizes`` are those of the groups."""
    kept: dict[str, list[npt.NDArray[np.float64]]] = {}
    removed: dict[str, list[npt.NDArray[np.float64]]] = {}
    for group, size in zip(groups, sizes, strict=True):
        units = None if scores is None else scores.units.get(group.name)
        if units is None:
            continue
        stays: Any = size.after > 0
        if size.after and group.factor is not None and group.factor in keep.units:
            stays = keep.units[group.factor]
        mask = np.broadcast_to(stays, units.shape)
        kept.setdefault(size.place, []).append(units[mask])
        removed.setdefault(size.place, []).append(units[~mask])
    return {place: Spread(_quartiles(kept[place]), _quartiles(removed[place])) for place in kept}


def _quartiles(parts: Sequence[npt.NDArray[np.float64]]) -> tuple[float, ...]:
    values = np.concatenate(parts)
    return tuple(map(float, np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))) if values.size else ()
