"""The result of a prune."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx

from fxprune.checkpoint import save_pretrained
from fxprune.checkpoint.write import check_repository, push_folder
from fxprune.data.calibration import Calibration, token_input
from fxprune.draw.write import layer_svg
from fxprune.emit.emitted import Emitted
from fxprune.emit.structure import Structure
from fxprune.errors import ExportError
from fxprune.evaluation.comparison import Comparison, graph_predictor, measure_quality, window_of
from fxprune.export import export_graph, export_model
from fxprune.export.model import check_options
from fxprune.graph.context import silence_stderr, wrap_errors
from fxprune.graph.facts import facts_of
from fxprune.offload.atomic import write_file
from fxprune.pipeline.arguments import as_path, instance
from fxprune.pipeline.contract import Track, check_track, no_progress
from fxprune.pipeline.pipeline import html_table
from fxprune.removal.plan import Plan
from fxprune.removal.removal import Removed, Scores
from fxprune.report.report import Headline, Report


@dataclass(frozen=True)
class Result:
    """A slim model in two forms, and how it came about.

    Args:
        graph_module: the slim graph; trains, moves, compiles.
        model: the slim Hugging Face model, sharing its tensors with ``graph_module``; None where the model is not
            one or its classes cannot express the plan, with the reason in ``report.model_reasons``.
        plan: which indices of which parameter stayed.
        report: numbers before and after.
        scores: what each unit was worth: ``scores.save(file)`` keeps them, and
            ``fxprune.prune(importance="load-scores{file=...}")`` decides by them, for another ratio too; None where a
            plan was applied.
        tokenizer: the tokenizer of the slim model; None if its vocabulary is that of the dense one.
    """

    graph_module: fx.GraphModule
    model: Any
    plan: Plan
    report: Report
    scores: Scores | None = None
    tokenizer: Any = None

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> Result:
        """Return the result that a pipeline left in the facts about ``graph_module``.

        Raises:
            PassError: nothing was removed from the graph, or no report was made.
        """
        facts = facts_of(graph_module)
        emitted, removal = facts.get(Emitted), facts[Removed].removal
        model = None if emitted is None else emitted.model
        return cls(graph_module, model, removal.plan, facts[Report], removal.scores)

    def __repr__(self) -> str:
        """Parameters before and after, in a line."""
        dense, slim = self.report.parameters
        name = self.report.model or "a model"
        return f"<Result {name}: {dense:,} to {slim:,} parameters ({-self.report.achieved:+.1%})>"

    def __str__(self) -> str:
        """The target, sizes before and after, the units left of each kind, and the samples used, one a line."""
        report = self.report
        lines = [] if report.reached is None else [str(report.reached)]
        lines += [f"{name}: {dense} to {slim}" for name, dense, slim, _ in self._rows()]
        lines += [] if report.calibration is None else [f"calibrated on {report.calibration}"]
        lines += [] if report.quality is None else map(str, report.quality.texts)
        return "\n  ".join((repr(self), *lines))

    def _repr_html_(self) -> str:
        return html_table(self.report.model or "Result", self._rows(), ("", "dense", "slim", "left"))

    def _rows(self) -> list[tuple[str, str, str, str]]:
        sizes = [*self.report.headlines()]
        sizes += [Headline(kind.units, kind.before, kind.after) for kind in self.report.kinds() if kind.shrunk]
        return [(size.name, f"{size.dense:,}", f"{size.slim:,}", f"{size.left:.1%}") for size in sizes]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the slim graph.

        Raises:
            FxpruneError: it does not run on these inputs.
        """
        with wrap_errors("inputs", "Pass what the dense model takes, each by its name"), silence_stderr():
            return self.graph_module(*args, **kwargs)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        tokenizer: Any = None,
        *,
        max_shard_size: int | str = "5GB",
        force: bool = False,
        also: Callable[[Path], object] | None = None,
        verify: bool = True,
    ) -> Structure:
        """Write the slim model with its plan, report and model card to ``folder``; see :func:`fxprune.save_pretrained`.

        A tokenizer of its own, ``result.tokenizer``, is saved with it in place of that of the dense model.

        Raises:
            CheckpointError: there is no slim Hugging Face model, or the folder holds something else.
        """
        model = Emitted(self.model, self.report.model_reasons).require_model()
        words = tokenizer if self.tokenizer is None else self.tokenizer
        options: dict[str, Any] = {"max_shard_size": max_shard_size, "force": force, "also": also, "verify": verify}
        return save_pretrained(model, folder, words, plan=self.plan, report=self.report, **options)

    def evaluate(
        self, dense: Any, tokenizer: Any, *, text: str | os.PathLike[str] | None = None, track: Track = no_progress
    ) -> Result:
        """This result with its quality beside the dense model's in the report, as :func:`fxprune.prune` measures it.

        For a prune that did not: without a tokenizer, in place, or with weights on disk.

        Args:
            tokenizer: that of the dense model.
            text: a file of text, of which the part is measured on that was not used; None for built-in text.

        Raises:
            FxpruneError: the text cannot be read, or a model cannot be run on it.
        """
        check_track(track)
        slim = graph_predictor(self.graph_module) if self.model is None else self.model
        options: dict[str, Any] = {"pruned": self.graph_module, "window": window_of(dense), "track": track}
        options["speakers"] = None if self.model is None else (dense, self.model)
        options["dense_tokenizer"] = None if self.tokenizer is None else tokenizer
        quality = measure_quality(dense, slim, self.tokenizer or tokenizer, text, **options)
        return replace(self, report=self.report.with_quality(quality))

    def push_to_hub(self, repository: str, tokenizer: Any = None, *, private: bool | None = None) -> str:
        """Save the slim model with its plan, report and card, and upload it; returns the address.

        Args:
            repository: ``owner/name`` on the hub, which is made if there is none.
            private: whether a new repository is private; None as its owner has it.

        Raises:
            CheckpointError: there is no slim Hugging Face model, or the hub refuses it or cannot be reached.
        """
        check_repository("repository", repository)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / repository.rpartition("/")[2]
            self.save_pretrained(folder, tokenizer)
            return push_folder(folder, repository, private=private)

    def to_html(self, comparison: Comparison | None = None) -> str:
        """Return the report as one HTML page that needs no other file.

        It has the picture of a layer where graphviz is installed.

        Args:
            comparison: quality and speed, from :func:`fxprune.evaluation.comparison.compare_models`; None to leave
                them out.

        Raises:
            ArgumentError: it is no comparison.
        """
        report = self.report
        if not report.picture:
            report = replace(report, picture=layer_svg(self.graph_module, self.plan.norm))
        if comparison is not None:
            instance("comparison", comparison, Comparison, "what compare_models returns, or None")
            names = ("", *(column.name for column in comparison.columns))
            report = replace(report, measured=(names, *comparison.rows()))
        return report.to_html()

    def write_report(self, path: str | os.PathLike[str], comparison: Comparison | None = None) -> Path:
        """Write :meth:`to_html` to a file.

        Raises:
            ArgumentError: ``comparison`` is no comparison.
            FxpruneError: the file cannot be written.
        """
        target = Path(as_path("path", path))
        write_file(target, self.to_html(comparison))
        return target

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        like: str | os.PathLike[str] | None = None,
        quantization: str | None = None,
        calibration: Any = None,
        cache: bool = False,
        example_inputs: Mapping[str, Any] | None = None,
        verify: bool = True,
    ) -> Path:
        """Write one file that runs without this package.

        The slim graph becomes a program, ``.pt2`` or ``.onnx``, see :func:`fxprune.export_graph`; the slim model a GGUF
        file, or with ``cache=True`` a program that generates, see :func:`fxprune.export_model`. K-quants and i-quants
        weigh their errors by the samples of the prune if no others are given.

        Raises:
            UnknownNameError: there is no such suffix, or no such quantisation.
            ExportError: the graph or the model cannot be exported, there is no slim model, or packages are missing.
            VerificationError: the program computes something else; nothing is written.
        """
        if self.tokenizer is not None:
            tokenizer, like = self.tokenizer, None
        options: dict[str, Any] = {"tokenizer": tokenizer, "like": like, "quantization": quantization, "cache": cache}
        path = as_path("path", path)
        check_options(Path(path), calibration=calibration, example_inputs=example_inputs, **options)
        if not cache and Path(path).suffix != ".gguf":
            return export_graph(self.graph_module, path, example_inputs=example_inputs, verify=verify)
        if self.model is None:
            what = f"there is no slim model: {'; '.join(self.report.model_reasons[:3])}"
            raise ExportError(what, where="model", remedy="Export the graph, as .pt2 or .onnx")
        found, name = facts_of(self.graph_module).get(Calibration), token_input(self.graph_module)
        if calibration is None and Path(path).suffix == ".gguf" and found is not None and name is not None:
            calibration = [{"input_ids": one.inputs[name]} for one in found.samples]
        return export_model(self.model, path, calibration=calibration, verify=verify, **options)
