"""What can be said of a prune, and the arguments of passes that it stands for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fxprune.data.text import check_tokenizer
from fxprune.discovery.groups import as_kinds
from fxprune.pipeline.arguments import MEMORY, as_seed, flag, one_of
from fxprune.pipeline.contract import Pass, Track, check_track
from fxprune.recipes.choices import said, unless
from fxprune.recipes.recipe import Recipe
from fxprune.removal.scores import Scores

__all__ = ["Options"]

_LITTLE_MEMORY = "low"
"""In place, memory matters more than time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """What a prune may be told; each is an argument of :func:`fxprune.prune` with the same name and default.

    What is left out, or None, is as the recipe says.

    Args:
        calibration: token ids ``(samples, tokens)``, a list of tokenised dicts, a DataLoader; or None: with a tokenizer
            for built-in text and what the model writes itself, else for criteria that need no data.
        recipe: ``balanced``, ``fast``, ``best`` or ``llm-pruner``, as ``fxprune recipes`` lists them; a file with one;
            or a pipeline in text. None: ``balanced``, but where an importance is named ``llm-pruner``, the paper as
            published, which adds nothing to what the other arguments say.
        ratio: fraction of the parameters that goes, in [0, 1), 0.2 by default; reached within half a percentage point.
            By kind, as in ``{"mlp": 0.3, "head": 0.1}``: the fraction of the parameters in structures of that kind.
        kinds: what may go: ``mlp``, ``head``, ``channel``, ``head_dim``, ``expert``, ``layer``; or a ratio by kind.
            ``exact-`` in front of one, as in ``exact-mlp``, leaves out its groups that a norm runs over.
        importance: ``taylor``, ``l1``, ``l2``, ``random`` or another registered importance pass, with arguments of its
            own as in ``"taylor{order=second}"``; or a pass. One that needs no samples, where there are none, fits
            nothing either.
        taylor: ``vector``, ``first``, ``second`` or ``mix``; the same as ``importance="taylor{order=...}"``.
        scores: kept from an earlier run, or the path of a file with such; they take the place of ``importance``.
        reduction: how members of a group are combined: ``sum``, ``prod``, ``max``, ``mean``, ``first``, ``last``.
        ranking: ``local``: the same fraction in every group; ``global``: the lowest scores anywhere.
        group_ratio: the paper's ratio, a fraction of the units of every group; takes the place of ``ratio``.
        protect: layers kept whole at the front and the end, or fractions of the depth; ``()``: none. The paper's are
            4 and 2 of 32, scaled.
        round_to: slim widths are multiples of this. By kind, as in ``{"mlp": 64, "head": 2}``, it counts units.
            ``"auto"``: of what :func:`fxprune.evaluation.measure_widths` found worth it on the device of the model.
        uniform: the same widths in every layer, and such that the model's own config class takes them: the checkpoint
            then loads in stock transformers, and in whatever reads its format. ``protect`` must be empty or None.
        tensor_parallel: devices that share each layer: MLP channels and heads of one that shrinks are multiples of it.
        budget: what ``ratio`` is of: ``params``, ``macs``, ``kv`` (bytes of the key-value cache), ``bytes@q8_0``, ..;
            or ``prefill@times.json``, ``decode@times.json``, by times that ``fxprune bench DENSE SLIM --json`` told.
        norm: what becomes of a norm over units that go, such as channels of the residual stream: ``sliced``, an average
            of those that stay; or ``masked``, what it is with the others zeroed, so that removing them is exact: its
            weight and its epsilon change. A norm that has no such form stays sliced, and the notes say so. With
            ``uniform`` they are sliced unless this says otherwise: a stock config may have one epsilon for all.
        steps: how often it scores: after each step a part has gone, what stays is fitted, and the rest scored again.
        select: a registered selection pass, or a pass, in place of what ``ratio`` or ``group_ratio`` stands for.
        compensate: ``least-squares``, perhaps with arguments: weights that lost inputs are fitted to what the dense
            model computes on the calibration data; or a pass. ``"none"`` leaves every kept number as it is.
        tune: ``tune``, perhaps with arguments as in ``"tune{epochs=2}"``: a few vectors are learned end to end on the
            slim model; or a pass. ``"none"``: no tuning.
        tokenizer: the model's own: with it there are calibration samples where none are given, and held-out text
            of another kind for tuning to stop by.
        seed: for ``random`` importance, what the model writes, the verification inputs and the order of samples in
            tuning.
        verify: check that masking equals shrinking, and that the emitted model equals the graph.
        inplace: free each dense tensor as its slim one is made; ``model`` then *becomes* the slim model.
        memory: for sums of gradients: ``low`` takes a part of the model after the other, a tenth of the bytes of the
            weights at a time at the most, and one more forward run; ``fast`` all at once; ``auto``, the default, what
            fits; in place ``low``. The scores are the same. Given as ``low``, removing is compared with masking block
            by block.
        track: shows progress, as ``track(items, what, total)``.
    """

    calibration: Any = None
    recipe: str | Recipe | os.PathLike[str] | None = None
    ratio: float | Mapping[str, float] | None = None
    kinds: str | Sequence[str] | None = None
    importance: str | Pass | None = None
    taylor: str | None = None
    scores: Scores | str | os.PathLike[str] | None = None
    reduction: str | None = None
    ranking: str | None = None
    group_ratio: float | Mapping[str, float] | None = None
    protect: tuple[float, float] | tuple[()] | None = None
    round_to: int | str | Mapping[str, int] = 1
    uniform: bool = False
    tensor_parallel: int = 1
    budget: str = "params"
    norm: str | None = None
    steps: int = 1
    select: str | Pass | None = None
    compensate: str | Pass | None = None
    tune: str | Pass | None = None
    tokenizer: Any = None
    seed: int = 0
    verify: bool = True
    inplace: bool = False
    memory: str | None = None
    track: Track | None = None

    def __post_init__(self) -> None:
        """Refuse what no pass would."""
        for name in ("verify", "inplace", "uniform"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        object.__setattr__(self, "seed", as_seed("seed", self.seed))
        if self.memory is not None:
            one_of("memory", self.memory, MEMORY)
        check_tokenizer(self.tokenizer)
        if self.track is not None:
            check_track(self.track)

    @cached_property
    def by_stage(self) -> dict[str, dict[str, Any]]:
        """The arguments of passes that are not as the recipe says, by stage; under ``""`` those of all stages."""
        kinds, wanted = self._wanted
        widths = said({"kinds": kinds, "ranking": self.ranking, "protect": self.protect, **wanted})
        for name, default in (("round_to", 1), ("tensor_parallel", 1), ("budget", "params")):
            widths |= unless(name, getattr(self, name), default)
        if self.uniform:
            widths |= {"uniform": True, "protect": () if self.protect is None else self.protect}
        memory = self.memory or (_LITTLE_MEMORY if self.inplace else None)
        return {
            "": said({"seed": self.seed or None, "track": self.track}),
            "discover": said({"norm": self.norm or ("sliced" if self.uniform else None)}),
            "importance": said({"kinds": kinds, "reduction": self.reduction, "memory": memory}),
            "select": widths,
            "verify": said({"by_block": self.memory == _LITTLE_MEMORY or None}),
            "tune": said({"tokenizer": self.tokenizer}),
        }

    @property
    def _wanted(self) -> tuple[tuple[str, ...] | None, dict[str, Any]]:
        """The kinds that may go, None for those of the recipe, and what is wanted of them.

        A ratio by kind says which they are.
        """
        name = "ratio" if self.group_ratio is None else "group_ratio"
        asked = getattr(self, name)
        named = tuple(asked) or self.kinds if isinstance(asked, Mapping) else self.kinds
        return None if named is None else as_kinds(named), {name: asked}
