"""Tables of the quality page: means over draws, with errors over windows and the spread over draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from benchmarks.quality.entries import is_ablation, is_current, place_of_entry
from benchmarks.quality.rows import DENSE, Protocol, QualityRow, compare, over_dense, read_rows
from fxprune.evaluation import Perplexity

_NONE = "-"
"""Empty cell."""

_CONTROL = ", random units"
"""End of the name of an entry whose units are drawn at random, with the widths and all else of the one before it."""


@dataclass(frozen=True)
class Section:
    """Rows of one model that were measured by one protocol: the dense one, and the others."""

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
        """Size, trained parts and costs of the prune, by entry."""
        for name, drawn in self.entries(ratio):
            threads = max(row.threads for row in drawn)  # times with other numbers of threads do not compare
            yield {
                "entry": titled(name, drawn),
                "parameters": fmean(row.parameters for row in drawn),
                "trained": drawn[0].trained,
                "trained_tokens": max(row.trained_tokens for row in drawn),
                "seconds": fmean(row.seconds for row in drawn if row.threads == threads),
                "threads": threads,
                "peak_gb": max(row.peak_gb for row in drawn),
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
        """For each entry its draws, means over all texts, and the least and the largest perplexity over dense.

        The means are of the perplexity over that of the dense model, of the divergence, and of the agreement.
        """
        dense = self.dense.at(length)
        for name, drawn in self.entries(ratio):
            rows = [row.at(length) for row in drawn if row.at(length).keys() >= dense.keys()]
            by_text = [[found for row in rows if (found := row[text].divergence) is not None] for text in dense]
            if not rows or any(len(each) < len(rows) for each in by_text):
                continue
            ratios = [fmean(each.ratio for each in found) for found in by_text]
            errors = [fmean(each.ratio_error for each in found) for found in by_text]
            error = sum(each**2 for each in errors) ** 0.5 / len(errors)
            every = [each for found in by_text for each in found]
            same, mean = fmean(each.agreement for each in every), fmean(each.mean for each in every)
            spread = f"x{_short(min(ratios))} to x{_short(max(ratios))}"
            cells = [f"x{_short(fmean(ratios))} ± {_short(error)}", spread]
            yield [titled(name, drawn), str(len(rows)), *cells, f"{mean:.2f}", f"{same:.0%}"]

    def worth(self, ratio: float, length: int) -> Iterator[tuple[str, int, list[str]]]:
        """For each recipe with a control, its perplexity over that of random units, from the same draws and windows."""
        controls = [name for name, _ in self.entries(ratio) if name.endswith(_CONTROL)]
        return self._compared(ratio, length, [(name.removesuffix(_CONTROL), name) for name in controls])

    def changes(self, ratio: float, length: int) -> Iterator[tuple[str, int, list[str]]]:
        """For each ablation, its perplexity over that without the change, from the same draws and windows."""
        changed = [name for name, _ in self.entries(ratio) if is_ablation(name)]
        return self._compared(ratio, length, [(name, _unchanged(name)) for name in changed])

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
    current = all(is_current(row.entry, row.ratio, row.draw, row.passes) for row in rows)
    return name if current else f"{name} †"


def _unchanged(name: str) -> str:
    """The entry of which an ablation changes one thing: its name without the last change."""
    return name.rpartition(",")[0]


def over(ratios: Sequence[tuple[float, float | None]]) -> str:
    """The mean of ratios over draws, ± the standard error over windows of one draw, and their range."""
    if not ratios:
        return _NONE
    values, errors = [value for value, _ in ratios], [error for _, error in ratios if error is not None]
    error = f" ± {_short(fmean(errors))}" if len(errors) == len(values) else ""
    spread = f" ({_short(min(values))} to {_short(max(values))})" if len(values) > 1 else ""
    return f"x{_short(fmean(values))}{error}{spread}"


def _short(value: float) -> str:
    """A number with two decimals, or none from a thousand on."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


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
    """Sections of a file of results, the most thorough protocol first; rows that it has anew are left out of others."""
    rows = read_rows(data)
    protocols = sorted(dict.fromkeys(row.protocol for row in rows), key=_thoroughness, reverse=True)
    known: set[tuple[str, float]] = set()
    found = []
    for protocol in protocols:
        own = [row for row in rows if row.protocol == protocol]
        dense = next(row for row in own if row.entry == DENSE)
        rest = tuple(row for row in own if row.entry != DENSE and (row.entry, row.ratio) not in known)
        known.update((row.entry, row.ratio) for row in rest)
        if rest:
            found.append(Section(protocol, dense, rest))
    return found


def _thoroughness(protocol: Protocol) -> tuple[bool, bool, int, int]:
    return protocol.kept_back > 0, protocol.windows is None, len(protocol.lengths), protocol.windows or 0


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


def task_rows(tasks: Mapping[str, Any]) -> Iterator[list[str]]:
    """For each model its accuracy on each task, with the error; of others, the difference from the dense model.

    The last two cells are the mean over the tasks, and the fraction of answers that are another choice than the dense
    model's.
    """
    for column in tasks["columns"]:
        paired, scores = column is not tasks["columns"][0], column["evaluation"]["tasks"].values()
        found = [(score["value"], score["standard_error"]) for score in scores]
        found = list(column["difference"].values()) if paired else found
        mean = fmean(value for value, _ in found), sum(error**2 for _, error in found) ** 0.5 / len(found)
        cells = [f"{100 * value:{'+' if paired else ''}.1f} ± {100 * error:.1f}" for value, error in (*found, mean)]
        changed = [flips[1][0] for flips in column["flips"].values() if flips] if paired else []
        yield [column["name"], *cells, f"{fmean(changed):.1%}" if changed else _NONE]
