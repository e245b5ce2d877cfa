"""Tables of the quality page: means over draws, with errors over windows and the spread over draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

from benchmarks.quality.entries import CONTROL, EARLIER, is_ablation, is_current, place_of_entry
from benchmarks.quality.rows import DENSE, Protocol, QualityRow, compare, over_dense, read_rows
from fxprune.evaluation import Perplexity, TaskScore

_NONE = "-"
"""Empty cell."""

_MARK = " †"
"""End of the name of an entry that was measured with an earlier version of its recipe."""


@dataclass(frozen=True)
class Section:
    """Rows of one model that were measured by one protocol: the dense one, and the others.

    Rows measured in another type stand among them: the perplexity over dense, the divergence and the agreement of each
    compare it with the dense model in its own type. The protocol and the dense row are those of the type of most rows.
    """

    protocol: Protocol
    dense: QualityRow
    rows: tuple[QualityRow, ...]

    @property
    def ratios(self) -> list[float]:
        """Ratios that were measured, in ascending order."""
        return sorted({row.ratio for row in self.rows if row.ratio})

    @property
    def recipes(self) -> Section:
        """Rows of recipes, their controls and other models."""
        return replace(self, rows=tuple(row for row in self.rows if not is_ablation(row.entry)))

    @property
    def ablations(self) -> Section:
        """Rows of recipes with one ingredient changed, and of the recipes that were changed."""
        changed = {(row.entry, row.ratio) for row in self.rows if is_ablation(row.entry)}
        kept = changed | {(_unchanged(name), ratio) for name, ratio in changed}
        return replace(self, rows=tuple(row for row in self.rows if (row.entry, row.ratio) in kept))

    @property
    def other_types(self) -> dict[str, list[str]]:
        """Entries and ratios by the type they were measured in, if it is not that of the protocol."""
        return self.places(lambda row: row.protocol.measured_in, self.protocol.measured_in)

    def places(self, setting: Callable[[QualityRow], str], usual: str) -> dict[str, list[str]]:
        """Entries and ratios by a setting, where it is not the usual one; with the draw if draws differ in it."""
        found: dict[str, dict[str, None]] = {}
        for row in self.rows:
            if setting(row) != usual:
                alike = [one for one in self.rows if (one.entry, one.ratio) == (row.entry, row.ratio)]
                draw = f", draw {row.draw}" if any(setting(one) != setting(row) for one in alike) else ""
                found.setdefault(setting(row), {})[f"{row.entry} at {row.ratio:.0%}{draw}"] = None
        return {each: list(names) for each, names in found.items()}

    def texts(self, length: int) -> list[str]:
        """Names of the texts that were measured on in windows of a length."""
        return list(self.dense.at(length))

    def windows(self, length: int) -> dict[str, int]:
        """Number of windows of each text."""
        return {name: found.windows for name, found in self.dense.at(length).items()}

    def entries(self, ratio: float) -> Iterator[tuple[str, list[QualityRow]]]:
        """Names of entries with their draws, in the order of tables; models that were not pruned stand at the end."""
        own = [row for row in self.rows if row.ratio in (ratio, 0.0)]
        for name in sorted(dict.fromkeys(row.entry for row in own), key=place_of_entry):
            yield name, [row for row in own if row.entry == name]

    def _by_text(self, drawn: Sequence[QualityRow], length: int) -> dict[str, list[Perplexity]]:
        """For each text the findings of the draws that were measured on it."""
        rows = [row.at(length) for row in drawn]
        return {text: [row[text] for row in rows if text in row] for text in self.texts(length)}

    def costs(self, ratio: float) -> Iterator[dict[str, Any]]:
        """Size, trained parts and costs of the prune, by entry; times are of the processor with the most draws."""
        for name, drawn in self.entries(ratio):
            (cpu, threads), _ = Counter((row.cpu, row.threads) for row in drawn).most_common(1)[0]
            timed = [row for row in drawn if (row.cpu, row.threads) == (cpu, threads)]  # others do not compare
            yield {
                "entry": titled(name, drawn),
                "parameters": fmean(row.parameters for row in drawn),
                "trained": drawn[0].trained,
                "trained_tokens": max(row.trained_tokens for row in drawn),
                "seconds": fmean(row.seconds for row in timed),
                "threads": threads,
                "cpu": cpu,
                "peak_gb": min(row.peak_gb for row in drawn),  # other rows before one leave something in the process
                "draws": len(drawn),
            }

    def ratio_rows(self, ratio: float, length: int) -> Iterator[tuple[str, list[str]]]:
        """For each entry, perplexity over that of the dense model on each text."""
        dense = self.dense.at(length)
        for name, drawn in self.entries(ratio):
            found = self._by_text(drawn, length).items()
            ratios = ([over_dense(one, dense[text]) for one in each] for text, each in found)
            yield titled(name, drawn), [over([ratio for ratio in each if ratio is not None]) for each in ratios]

    def divergence_rows(self, ratio: float, length: int) -> Iterator[tuple[str, list[str]]]:
        """For each entry, divergence from the dense model, its tail, and agreement, on each text."""
        for name, drawn in self.entries(ratio):
            yield titled(name, drawn), [_apart(found) for found in self._by_text(drawn, length).values()]

    def bit_rows(self, ratio: float, length: int) -> Iterator[tuple[str, list[str]]]:
        """For the dense model and each entry, bits per byte on each text."""
        for name, drawn in ((DENSE, [self.dense]), *self.entries(ratio)):
            yield titled(name, drawn), [_bits(found) for found in self._by_text(drawn, length).values()]

    def short_rows(self, ratio: float, length: int) -> Iterator[list[str]]:
        """For each entry its draws, and means over all texts, with the ranges over texts and over draws.

        The means are of the perplexity over that of the dense model, of the divergence, and of the agreement.
        """
        dense = self.dense.at(length)
        for name, drawn in self.entries(ratio):
            rows = [row.at(length) for row in drawn if row.at(length).keys() >= dense.keys()]
            by_text = [[found for row in rows if (found := row[text].divergence) is not None] for text in dense]
            if not rows or any(len(each) < len(rows) for each in by_text):
                continue
            ratios = [fmean(each.ratio for each in found) for found in by_text]
            by_draw = [fmean(each.ratio for each in found) for found in zip(*by_text, strict=True)]
            errors = [fmean(each.ratio_error for each in found) for found in by_text]
            error = sum(each**2 for each in errors) ** 0.5 / len(errors)
            every = [each for found in by_text for each in found]
            same, mean = fmean(each.agreement for each in every), fmean(each.mean for each in every)
            cells = [f"x{_short(fmean(ratios))} ± {_short(error, fmean(ratios))}", _range(ratios), _range(by_draw)]
            yield [titled(name, drawn), str(len(rows)), *cells, f"{mean:.2f}", f"{same:.0%}"]

    def means(self, ratio: float, length: int) -> dict[str, str]:
        """Perplexity over dense by entry, the mean over texts and draws; marked as the name of the entry is."""
        rows = [(cells[0], cells[2]) for cells in self.short_rows(ratio, length)]
        return {name.removesuffix(_MARK): value + _MARK * name.endswith(_MARK) for name, value in rows}

    def worth(self, ratio: float, length: int) -> Iterator[tuple[str, int, list[str]]]:
        """For each recipe with a control, its perplexity over that of random units, from the same draws and windows."""
        controls = [name for name, _ in self.entries(ratio) if name.endswith(CONTROL)]
        return self._compared(ratio, length, [(name.removesuffix(CONTROL), name) for name in controls])

    def changes(self, ratio: float, length: int) -> Iterator[tuple[str, int, list[str]]]:
        """For each ablation, its perplexity over that without the change, from the same draws and windows.

        One that was measured with an earlier version of the recipe is compared with the row that is most like it.
        """
        every = dict(self.entries(ratio))
        pairs = []
        for name, rows in every.items():
            base = _unchanged(name)
            if is_ablation(name):
                earlier = () if _is_current(rows) or name in EARLIER.get(base, ()) else EARLIER.get(base, ())
                unlike = {one: _unlike(rows, every[one]) for one in (base, *earlier) if one in every}
                pairs += [(name, min(unlike, key=unlike.__getitem__, default=base))]
        for name, draws, cells in self._compared(ratio, length, pairs):
            other = dict(pairs)[name.removesuffix(_MARK)]
            beside = "" if other == _unchanged(name.removesuffix(_MARK)) else f", over *{other}*"
            yield f"{name}{beside}", draws, cells

    def _compared(
        self, ratio: float, length: int, pairs: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[str, int, list[str]]]:
        """For each pair of entries, the number of draws of both, and the ratio of their perplexities on each text."""
        every = dict(self.entries(ratio))
        drawn = {name: {row.draw: row.at(length) for row in rows} for name, rows in every.items()}
        for name, other in pairs:
            ours, theirs = drawn.get(name, {}), drawn.get(other, {})
            draws = sorted(ours.keys() & theirs.keys())
            by_text = [
                [compare(ours[draw][text], theirs[draw][text]) for draw in draws
                 if text in ours[draw] and text in theirs[draw]]
                for text in self.texts(length)
            ]  # fmt: skip
            if draws:
                yield titled(name, [*every[name], *every[other]]), len(draws), [over(each) for each in by_text]


def titled(name: str, rows: Sequence[QualityRow]) -> str:
    """The name of an entry, with a mark if one of its rows was measured with an earlier version of the recipe."""
    return name if _is_current(rows) else f"{name}{_MARK}"


def _is_current(rows: Sequence[QualityRow]) -> bool:
    return all(is_current(row.entry, row.ratio, row.draw, row.passes) for row in rows)


def _unlike(rows: Sequence[QualityRow], others: Sequence[QualityRow]) -> float:
    """How much the passes of two entries differ, in [0, 1]."""
    return 1 - SequenceMatcher(None, rows[0].passes, others[0].passes, autojunk=False).ratio()


def _unchanged(name: str) -> str:
    """The entry of which an ablation changes one thing: its name without the last change."""
    return name.rpartition(",")[0]


def over(ratios: Sequence[tuple[float, float | None]]) -> str:
    """The mean of ratios over draws, ± the standard error over windows of one draw, and their range."""
    if not ratios:
        return _NONE
    values, errors = [value for value, _ in ratios], [error for _, error in ratios if error is not None]
    error = f" ± {_short(fmean(errors), fmean(values))}" if len(errors) == len(values) else ""
    spread = f" ({_short(min(values))} to {_short(max(values))})" if len(values) > 1 else ""
    return f"x{_short(fmean(values))}{error}{spread}"


def _range(values: Sequence[float]) -> str:
    """The least and the largest of several ratios."""
    return f"x{_short(min(values))} to x{_short(max(values))}" if len(values) > 1 else _NONE


def _short(value: float, of: float = 0.0) -> str:
    """A number with two decimals, or none if it, or the number whose error it is, is at least a thousand."""
    return f"{value:.2f}" if max(value, of) < 1000 else f"{value:,.0f}"


def _apart(found: Sequence[Perplexity]) -> str:
    """Means over draws of the divergence with its error, of its 99th percentile, and of the agreement."""
    apart = [one.divergence for one in found if one.divergence is not None]
    if not apart:
        return _NONE
    mean, error = (fmean(getattr(each, name) for each in apart) for name in ("mean", "mean_error"))
    tail, same = (fmean(getattr(each, name) for each in apart) for name in ("percentile_99", "agreement"))
    return f"{mean:.3f} ± {error:.3f}; {tail:.1f}; {same:.1%}"


def _bits(found: Sequence[Perplexity]) -> str:
    """Mean over draws of bits per byte, with the error over windows."""
    if not found:
        return _NONE
    return f"{fmean(f.bits_per_byte for f in found):.3f} ± {fmean(f.bits_per_byte_error for f in found):.3f}"


def sections(data: Mapping[str, Any]) -> list[Section]:
    """Sections of a file of results, the most thorough protocol first; rows that it has anew are left out of others.

    Rows of whole texts are left to :func:`whole_texts` where the beginnings of texts were measured too.
    """
    beginnings, whole = _by_reach(data)
    known: set[tuple[str, float]] = set()
    found = []
    for section in sorted(beginnings or whole, key=lambda section: _thoroughness(section.protocol), reverse=True):
        rest = tuple(row for row in section.rows if (row.entry, row.ratio) not in known)
        known.update((row.entry, row.ratio) for row in rest)
        if rest:
            found.append(replace(section, rows=rest))
    return found


def whole_texts(data: Mapping[str, Any]) -> list[Section]:
    """Sections of a file of results by whole texts, if others have the same by beginnings of texts."""
    beginnings, whole = _by_reach(data)
    return whole if beginnings else []


def _by_reach(data: Mapping[str, Any]) -> tuple[list[Section], list[Section]]:
    """Sections with rows beside the dense one, by protocol: those of beginnings of texts, and those of whole texts."""
    rows = read_rows(data)
    found = []
    for untyped in dict.fromkeys(replace(row.protocol, measured_in="") for row in rows):
        own = [row for row in rows if replace(row.protocol, measured_in="") == untyped]
        rest = [row for row in own if row.entry != DENSE]
        if rest:
            (protocol, _), *_ = Counter(row.protocol for row in rest).most_common()
            rest.sort(key=lambda row: (not _is_current([row]), row.protocol != protocol))
            once: dict[tuple[str, float, int], QualityRow] = {}
            for row in rest:
                once.setdefault((row.entry, row.ratio, row.draw), row)
            dense = next(row for row in own if row.entry == DENSE and row.protocol == protocol)
            found.append(Section(protocol, dense, tuple(once.values())))
    whole = [section for section in found if section.protocol.windows is None]
    return [section for section in found if section not in whole], whole


def _thoroughness(protocol: Protocol) -> tuple[bool, int, int]:
    return protocol.kept_back > 0, len(protocol.lengths), protocol.windows or 0


def type_error(data: Mapping[str, Any], protocol: Protocol) -> tuple[str, float] | None:
    """The largest relative difference of the dense model's perplexity between types, and the other type.

    None if it was measured on the same windows in one type only.
    """
    dense = [row for row in read_rows(data) if row.entry == DENSE and row.protocol.model == protocol.model]
    ours = next(row for row in dense if row.protocol == protocol)
    for other in dense:
        if other.protocol.measured_in != protocol.measured_in and other.protocol.kept_back == protocol.kept_back:
            pairs = list(_same_windows(ours, other))
            if pairs:
                return other.protocol.measured_in, max(abs(compare(a, b)[0] - 1) for a, b in pairs)
    return None


def _same_windows(one: QualityRow, other: QualityRow) -> Iterable[tuple[Perplexity, Perplexity]]:
    for length in one.protocol.lengths:
        theirs = other.at(length)
        for text, found in one.at(length).items():
            if text in theirs and theirs[text].windows == found.windows:
                yield found, theirs[text]


def known_tasks(tasks: Mapping[str, Any]) -> list[str]:
    """The tasks on which the dense model knows something, by :attr:`fxprune.evaluation.TaskScore.informed`."""
    scores = tasks["columns"][0]["evaluation"]["tasks"]
    return [name for name, score in scores.items() if TaskScore(**score).informed]


def retained(tasks: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    """Mean accuracy on the known tasks as a fraction of the dense model's, ± its standard error; "-" without a task.

    The error of a ratio ``r`` is that of ``b - r a``, whose variance is ``(1 - r) var b + (r r - r) var a + r var (b -
    a)``. Files have the errors of the accuracies ``a`` and ``b``, and that of their paired difference unless they are
    old: then the ratio stands alone.
    """
    names, dense = known_tasks(tasks), tasks["columns"][0]["evaluation"]["tasks"]
    slim, apart = column["evaluation"]["tasks"], column.get("difference")
    if not names:
        return _NONE
    total = sum(dense[name]["value"] for name in names)
    ratio = sum(slim[name]["value"] for name in names) / total
    if apart is None:
        return f"{ratio:.1%}"
    variance = sum(
        (1 - ratio) * slim[name]["standard_error"] ** 2
        + (ratio**2 - ratio) * dense[name]["standard_error"] ** 2
        + ratio * apart[name][1] ** 2
        for name in names
    )
    return f"{ratio:.1%} ± {max(variance, 0.0) ** 0.5 / total:.1%}"


def task_rows(tasks: Mapping[str, Any], rows: Sequence[QualityRow] = ()) -> Iterator[list[str]]:
    """For each model its accuracy on each task, with the error; of others, the difference from the dense model.

    The last cells are the mean over the tasks that the dense model knows something of, the fraction of answers to them
    that are another choice than the dense model's, and what is retained of its accuracy on them.
    """
    known = known_tasks(tasks)
    for column in tasks["columns"]:
        paired, scores = column is not tasks["columns"][0], column["evaluation"]["tasks"]
        found = {name: (score["value"], score["standard_error"]) for name, score in scores.items()}
        found = {name: tuple(each) for name, each in column["difference"].items()} if paired else found
        own = [found[name] for name in known]
        means = [(fmean(value for value, _ in own), sum(error**2 for _, error in own) ** 0.5 / len(own))] if own else []
        cells = [f"{100 * value:{'+' if paired else ''}.1f} ± {100 * error:.1f}" for value, error in found.values()]
        cells += [f"{100 * value:{'+' if paired else ''}.1f} ± {100 * error:.1f}" for value, error in means] or [_NONE]
        changed = [flips[1][0] for name, flips in column["flips"].items() if flips and name in known] if paired else []
        name = column["name"]
        ours = [row for row in rows if f"{row.entry}, {row.ratio:.0%}" == name and row.draw == 0]
        title = name if not paired or (ours and titled(name, ours) == name) else f"{name}{_MARK}"
        yield [title, *cells, f"{fmean(changed):.1%}" if changed else _NONE, retained(tasks, column)]
