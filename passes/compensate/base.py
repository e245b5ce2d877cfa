"""What compensation passes share: the dense and the masked graph side by side, one weight fitted after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import fx

from fxprune.data.calibration import Calibration, spread, stacked
from fxprune.data.ranks import as_first, own
from fxprune.discovery.dependency import Dependencies
from fxprune.errors import CalibrationError
from fxprune.graph.carrier import to_place
from fxprune.graph.facts import Change, Fact, Runnable, add_note, facts_of
from fxprune.graph.shelf import recalled, remembering
from fxprune.graph.source import put_values
from fxprune.graph.tensors import device_of, require_weights
from fxprune.masking.compare import Expected
from fxprune.masking.side_by_side import SideBySide
from fxprune.pipeline.arguments import one_of, whole_number
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.progress import Track, check_track, no_progress
from fxprune.pipeline.words import REACHES
from fxprune.removal.removal import Removal
from fxprune.removal.scores import Scores

from .sites import Site, find_sites, tokens

__all__ = ["FitPass", "pairs"]


@dataclass(frozen=True, eq=False)
class FitPass(Pass):
    """Fits weights that lost inputs, in order of execution, to what the dense graph computes.

    Weights before a fitted one are fitted already, so it makes up for what they could not; and one that lost nothing
    can make up for what those before it lost.

    Args:
        samples: calibration samples to take, evenly spread; None for all.
        batch: samples that run at once.
        reach: ``lost``: fit the weights that lost inputs; ``stream``: and those whose output is added to a value that
            changed, such as the projections of attention behind a feed-forward network that shrank; ``all``: and those
            that only read such a value.
        track: shows progress, as ``track(items, what, total)``.
    """

    stage: ClassVar[str] = "compensate"
    writes: ClassVar[bool] = False
    changes: ClassVar[Change] = "weights"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Removal, Calibration, Runnable)
    drops: ClassVar[tuple[type[Fact], ...]] = (Scores, Expected)
    carries: ClassVar[bool] = True

    samples: int | None = None
    batch: int = 16
    reach: str = "lost"
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        object.__setattr__(self, "batch", whole_number("batch", self.batch, least=1))
        if self.samples is not None:
            object.__setattr__(self, "samples", whole_number("samples", self.samples, least=1))
        one_of("reach", self.reach, REACHES)
        check_track(self.track)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise unless there are calibration samples and real weights."""
        super().requires(graph_module)
        require_weights(graph_module, self.name)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Fit one weight after the other.

        Raises:
            CalibrationError: an activation is not finite.
        """
        facts = facts_of(graph_module)
        removal = facts[Removal]
        sites = {site.product.node: site for site in find_sites(graph_module, removal, self.reach)}
        if not sites:
            return PassResult(graph_module, False)
        samples = own(spread(facts[Calibration].samples, self.samples))
        batches = list(stacked(samples, graph_module, self.batch))
        run = SideBySide(graph_module, removal.axes, removal.keep, removal.removed_blocks, batches)
        for node, site in sites.items():
            for held in site.held:
                run.hold(held, node)
        with torch.no_grad():
            wanted = (sites[node] for node in run if node in sites)
            # the range comes first, so that the graph is not run on after the last weight
            for _, site in zip(range(len(sites)), self.track(wanted, self.name, len(sites)), strict=False):
                for node, value in self._recalled(graph_module, site, run).items():
                    put_values(graph_module, str(node.target), value)
                    run.read_again(node)
                run.read_again(*site.behind)
        add_note(graph_module, f"{len(sites)} weights were fitted by {self.name.replace('-', ' ')}")
        return PassResult(graph_module, True)

    def _recalled(self, graph_module: fx.GraphModule, site: Site, run: SideBySide) -> Mapping[fx.Node, torch.Tensor]:
        """Return what an earlier run fitted, or fit it."""
        known = recalled(f"{site.name}.fit")
        if known is not None:
            name = {str(node.target): node for node in graph_module.graph.nodes}
            return {name[key]: value for key, value in load_file(known).items()}
        home = device_of(graph_module)
        fitted = self.fitted(graph_module, site, run)
        found = {node: to_place(value.contiguous(), home) for node, value in fitted.items()}
        as_first(found.values())
        with remembering(f"{site.name}.fit") as file:
            if file is not None:
                save_file({str(node.target): value for node, value in found.items()}, file)
        return found

    @abstractmethod
    def fitted(self, graph_module: fx.GraphModule, site: Site, run: SideBySide) -> Mapping[fx.Node, torch.Tensor]:
        """Return the whole weight of ``site``, its kept inputs fitted, by what reads it; and its bias, where it moves.

        Raises:
            CalibrationError: an activation is not finite.
        """


def pairs(site: Site, run: SideBySide) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield for each batch, and each matrix of the weight that has tokens there, what :func:`.sites.tokens` yields.

    Raises:
        CalibrationError: one of them is not finite.
    """
    for matrix, X, y in tokens(site, run):
        if not (X.isfinite().all() and y.isfinite().all()):
            raise CalibrationError(
                "its inputs or outputs are not finite", where=site.name, remedy="Check the weights and the samples"
            )
        yield matrix, X, y
