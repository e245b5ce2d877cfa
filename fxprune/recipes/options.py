"""Options of a prune: the one declaration behind :func:`fxprune.prune`, the command line and the table in the docs.

It is readable without torch, so that ``--help`` is quick: types that need torch are named for type checkers alone, and
checks import what they need when a value is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, get_type_hints

from fxprune.errors import UnknownNameError
from fxprune.pipeline.arguments import Argument, Memory, Norm, Ranking, as_path, as_seed, check_of, declared

if TYPE_CHECKING:
    from fxprune.pipeline.contract import Pass, Track
    from fxprune.recipes.recipe import Recipe
    from fxprune.removal.removal import Scores

WHAT_GOES, DATA, OUTPUT, MACHINE = "What goes", "Data", "Output", "Machine"
"""Panels of options."""

_UNCHECKED = dict.fromkeys(("Pass", "Recipe", "Scores", "Track"), object)
"""Types of values that are validated where they are used."""


def _argument(doc: str, **more: Any) -> Argument:
    return Argument(" ".join(doc.split()), **more)


_what_goes, _data, _output, _machine = (partial(_argument, panel=each) for each in (WHAT_GOES, DATA, OUTPUT, MACHINE))


def _check(name: str, value: Any) -> Any:
    from fxprune.data.calibration import check_names
    from fxprune.data.named import is_data_set
    from fxprune.data.text import calibration_text, check_tokenizer
    from fxprune.offload.prefetch import as_device
    from fxprune.pipeline.contract import check_track

    checks: dict[str, Callable[[Any], object]] = {"device": as_device, "example_inputs": check_names}
    checks |= {"track": check_track, "tokenizer": partial(check_tokenizer, name)}
    checks["eval_text"] = lambda text: is_data_set(text) or calibration_text(Path(as_path(name, text)))
    checks[name](value)
    return value


def _check_target(name: str, value: Any) -> str:
    from fxprune.removal.target import parse_target

    return parse_target(value).text


class ApplyOptions(TypedDict, total=False):
    """Options of :func:`fxprune.apply`, which carries out a plan."""

    compensate: Annotated[
        str | Pass | None,
        _what_goes("""Fit the weights that lost inputs to what the dense model computes on the calibration data:
            `least-squares`, optionally with arguments, or a pass; `none` leaves every kept weight as it is."""),
    ]
    tune: Annotated[
        str | Pass | None,
        _what_goes("""Train the slim model end to end: `tune`, optionally with arguments as in `tune{epochs=2}`, or a
            pass; `none` for no tuning."""),
    ]
    norm: Annotated[
        Norm | None,
        _what_goes("""How norms over removed units, such as channels of the residual stream, are treated: `masked`
            computes the output of the dense norm with these units zeroed, which makes the removal exact; `sliced`
            averages over the units that stay."""),
    ]
    tokenizer: Annotated[
        Any,
        _argument(
            """The tokenizer of the model, which provides calibration samples if none are given, and held-out text for
            early stopping in tuning.""",
            check=_check,
            spelled=False,
        ),
    ]
    eval: Annotated[
        bool,
        _data(
            """At the end, measure the slim model and the dense one on text that was not used: perplexity, divergence,
            the fraction of next tokens on which both agree, and an answer. This needs the tokenizer, and weights in
            memory.""",
            default=True,
        ),
    ]
    eval_text: Annotated[
        str | os.PathLike[str] | None,
        _data(
            """Text to measure on, of which only the part that was not used counts: a text file, rows in `.json`,
            `.jsonl` or `.parquet`, or the name of a data set; by default documentation of Python's library.""",
            check=_check,
        ),
    ]
    seed: Annotated[
        int,
        _data(
            "Seed of random scores, generated samples, verification inputs and the order of samples in tuning.",
            default=0,
            check=as_seed,
        ),
    ]
    verify: Annotated[
        bool,
        _argument("Check that masking equals shrinking, and that the emitted model equals the graph.", default=True),
    ]
    inplace: Annotated[
        bool,
        _machine("Free each dense tensor as its slim one is made: `model` then becomes the slim model.", default=False),
    ]
    device: Annotated[
        Any,
        _machine(
            """Device to compute on, such as `cuda`, while the weights stay where they are: the weights of each part of
            the model are moved to the device while it runs, and the next ones are prefetched.""",
            check=_check,
        ),
    ]
    example_inputs: Annotated[
        Mapping[str, Any] | None,
        _argument(
            """Keyword inputs of a module that is not a Hugging Face model; of one that is, in place of those that its
            config and the first calibration sample tell.""",
            check=_check,
            spelled=False,
        ),
    ]
    progress: Annotated[
        bool,
        _argument(
            "Show one bar for the whole run in a terminal or a notebook, unless there is a `track`.",
            default=True,
        ),
    ]
    track: Annotated[
        Track | None,
        _argument("Shows progress: `track(items, what, total)` yields the items.", check=_check, spelled=False),
    ]


class Options(ApplyOptions, total=False):
    """Options of :func:`fxprune.prune`. One that is left out, or None, is as the recipe has it."""

    recipe: Annotated[
        str | Recipe | os.PathLike[str] | None,
        _what_goes("""`balanced` (the default), `fast`, `best` or `llm-pruner`, the paper as published; a file with a
            recipe, or a pipeline as text. `fxprune recipes` lists what each recipe does and costs."""),
    ]
    ratio: Annotated[
        float | Mapping[str, float] | None,
        _what_goes("""Fraction of the parameters to remove, in [0, 1), reached to within half a percentage point; by
            default 0.2. If given for each kind, a fraction of the parameters in structures of that kind."""),
    ]
    target: Annotated[
        str | int | None,
        _what_goes(
            """In place of a ratio, the size or speed of the slim model: `100M` parameters, `80MB` of weights,
            `80MB@q4_k_m` for a GGUF file, `6GB` of memory with a `context`; or relative to the dense model: `0.8x
            params`, `0.5x macs`, `0.5x kv`, and `1.3x decode` by times of `fxprune bench --sweep`.""",
            check=_check_target,
        ),
    ]
    context: Annotated[
        int | None,
        _what_goes("Tokens of context for a memory target: weights, cache and activations.", limits={"least": 1}),
    ]
    kinds: Annotated[
        str | Sequence[str] | None,
        _what_goes("""Kinds of structures that may be removed: `mlp`, `head`, `conv`, `channel`, `head_dim`, `expert`,
            `layer`, and `vocab`, tokens with their rows of embedding and output layer. The prefix `exact-`, as in
            `exact-mlp`, leaves out groups that a norm runs over."""),
    ]
    part: Annotated[
        str | None,
        _what_goes("""Name of the only module to prune, as in `language_model`; the rest of the model stays whole and
            counts in the ratio."""),
    ]
    importance: Annotated[
        str | Pass | None,
        _what_goes("""The criterion, in place of the recipe's: `taylor`, `wanda`, `l2`, `random` or another pass,
            optionally with arguments as in `taylor{order=second}`."""),
    ]
    reduction: Annotated[
        str | None,
        _what_goes("""How scores of the members of a group are combined: `sum`, `prod`, `max`, `mean`, `first` or
            `last`."""),
    ]
    ranking: Annotated[
        Ranking | None,
        _what_goes("""`local`: the same fraction in every group; `global`: the lowest scores anywhere; `auto`: as
            `global`, by scores divided by the fraction of the group that is left."""),
    ]
    select: Annotated[
        str | Pass | None,
        _what_goes("""The selection, in place of the recipe's: `select-by-ratio`, `select-by-group-ratio`, ..., or a
            pass."""),
    ]
    protect: Annotated[
        tuple[float, float] | tuple[()] | None,
        _what_goes("""Number of layers kept whole at the front and at the end, or fractions of the depth; 0 and 0 for
            none."""),
    ]
    round_to: Annotated[
        int | str | Mapping[str, int],
        _output(
            """Slim widths are multiples of this; a number for each kind counts units. `auto`: multiples measured to be
            fast on the device, see `fxprune.evaluation.measure_widths`.""",
            default=1,
        ),
    ]
    uniform: Annotated[
        bool,
        _output(
            """The same widths in every layer, such that the stock config class can express them and stock transformers
            loads the checkpoint.""",
            default=False,
        ),
    ]
    tensor_parallel: Annotated[
        int,
        _output(
            "Devices that share each layer: numbers of MLP channels and heads that shrink are multiples of this.",
            default=1,
        ),
    ]
    budget: Annotated[
        str,
        _output(
            """What `ratio` is a fraction of: `params`, `macs`, `kv` (bytes of the key-value cache), `bytes@q8_0`, ...;
            or time, as in `decode@times.json`, with the output of `fxprune bench DENSE SLIM --json`.""",
            default="params",
        ),
    ]
    memory: Annotated[
        Memory | None,
        _machine("""`low` computes sums of gradients for one part of the model at a time, with one more forward run,
            verifies block by block, and recomputes parts in tuning; `fast` keeps everything at once; `auto`, the
            default, chooses by what fits."""),
    ]
    offload: Annotated[
        str | os.PathLike[str] | None,
        _argument(
            """Keep weights and intermediate results on disk, in the folder `<offload>.unfinished`, for a model larger
            than memory that is given as a folder or hub id; a killed run resumes if it is repeated with the same
            arguments and files.""",
            spelled=False,
        ),
    ]
    taylor: Annotated[str | None, _argument("Deprecated: write `importance='taylor{order=...}'`.")]
    group_ratio: Annotated[
        float | Mapping[str, float] | None,
        _argument("Deprecated: write `select='select-by-group-ratio{group_ratio=...}'`."),
    ]
    scores: Annotated[
        Scores | str | os.PathLike[str] | None,
        _argument("Deprecated: write `importance='load-scores{file=...}'`.", spelled=False),
    ]
    steps: Annotated[
        int,
        _argument("Deprecated: write `importance='score-in-steps{steps=...}'`.", default=1, limits={"least": 1}),
    ]


@cache
def option_table(declaration: type = Options) -> dict[str, tuple[Any, Argument]]:
    """Annotation and declaration of each option, by name, in order: of a dict of options, or a class of arguments."""
    if is_dataclass(declaration):
        kinds = get_type_hints(declaration)
        return {one.name: (kinds[one.name], declared(one)) for one in fields(declaration)}
    hints = get_type_hints(declaration, localns=_UNCHECKED, include_extras=True)
    own_first = sorted(hints, key=lambda name: name in ApplyOptions.__annotations__)
    return {name: (hints[name].__origin__, hints[name].__metadata__[0]) for name in own_first}


def resolve(options: Mapping[str, Any], declaration: type = Options) -> dict[str, Any]:
    """Validate options, and fill in the defaults of those left out.

    Raises:
        UnknownNameError: there is no such option.
        ArgumentError: a value is of the wrong type or out of range.
    """
    table = option_table(declaration)
    for name in options:
        if name not in table:
            raise UnknownNameError("argument", name, table, argument=name)
    values = {name: options.get(name, declared.default) for name, (_, declared) in table.items()}
    return {name: check_of(*table[name])(name, values[name]) for name in table}
