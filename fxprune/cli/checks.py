"""Options of a prune, each against what it may be and against the others, before any work. It needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

from fxprune.cli.naming import check_model
from fxprune.cli.numbers import check_numbers, check_samples
from fxprune.cli.place import check_output, is_file
from fxprune.cli.wording import option
from fxprune.errors import ArgumentError, FxpruneError, UnknownNameError
from fxprune.pipeline.arguments import EXACT, KINDS, NORMS, ORDERS, RANKINGS
from fxprune.pipeline.spelling import read_spelling, read_steps

__all__ = [
    "DTYPES",
    "check_dtype_and_device",
    "check_pass",
    "check_pass_name",
    "check_printing",
    "check_prune",
    "check_quantization",
    "check_recipe_name",
    "check_word",
]

DTYPES = ("float32", "bfloat16", "float16")

_DEVICE = re.compile(r"(cpu|mps|(cuda|xpu)(:\d+)?)")

_GROUP = "fxprune.passes"
"""Of the entry points of passes."""

_APART = (
    ("ratio", "group_ratio", "both say how much goes"),
    ("taylor", "importance", "both say how units are scored; importance 'taylor{order=second}' says both"),
    ("low_memory", "in_place", "weights on disk are not changed in place"),
    ("low_memory", "dtype", "weights on disk are used in the dtype of their files"),
    ("uniform", "protect", "no layer is kept whole where all have the same widths"),
    ("quiet", "verbose", "one asks for less, the other for more"),
)
"""Options that cannot be given together, and why."""

_WORDS = {"ranking": RANKINGS, "norm": NORMS, "taylor": ORDERS, "dtype": DTYPES}

Values = Mapping[str, Any]


def check_prune(values: Values) -> None:
    """Refuse a prune that cannot work, as far as that can be told without torch.

    Args:
        values: of all arguments by name; None, False where not given.

    Raises:
        FxpruneError: says which option, what is wrong with it, and what would do.
    """
    out = values["out"]
    if out is None and not values["dry_run"]:
        raise ArgumentError("there is no place to write to", where="out", remedy="Give --out, or --dry-run to look")
    _check_together(values)
    check_samples(values)
    check_numbers(values)
    _check_names(values)
    check_dtype_and_device(values["dtype"], values["device"])
    _check_recipe(values["recipe"])
    check_model(values["model"], values["gguf_file"], with_weights=not values["dry_run"])
    _check_output(values)
    if values["calibration"] is not None:
        from fxprune.data.text import calibration_text

        calibration_text(values["calibration"])


def check_printing(*, quiet: bool, verbose: bool) -> None:
    """Refuse to print less and more at the same time."""
    _check_together({"quiet": quiet, "verbose": verbose})


def check_dtype_and_device(dtype: str | None, device: str | None) -> None:
    """Refuse a dtype or a device that nothing is called by; whether the device is there, only torch can say.

    Raises:
        UnknownNameError: there is no such dtype.
        ArgumentError: it is no device.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    if device is not None and not _DEVICE.fullmatch(device):
        raise ArgumentError(f"device is {device!r}", where="device", remedy="Give cpu, cuda, cuda:1 or mps")


def check_word(name: str, value: str | None) -> None:
    """Refuse a word that an option does not know: of ``ranking``, ``norm``, ``taylor`` or ``dtype``."""
    if value is not None and value not in _WORDS[name]:
        raise UnknownNameError(name, value, _WORDS[name])


def check_pass(stage: str, spelled: str | None, *, optional: bool = False) -> None:
    """Refuse a spelling of what is no pass of a stage.

    Args:
        stage: the stage, and the option.
        spelled: as in ``taylor{order=second}``; None is fine.
        optional: whether ``none`` is, too.

    Raises:
        FxpruneError: it is no spelling, or the pass refuses one of the arguments.
        UnknownNameError: there is no such pass, or it takes no such argument.
    """
    if spelled is None or (optional and spelled == "none"):
        return
    name, arguments = read_spelling(spelled)
    known = _passes(stage)
    if name not in known:
        raise UnknownNameError(stage, name, (*known, "none") if optional else known)
    _check_arguments(name, arguments)


def check_pass_name(name: str) -> None:
    """Refuse a name that no installed pass has."""
    known = entry_points(group=_GROUP).names
    if name not in known:
        raise UnknownNameError("pass", name, known)


def check_recipe_name(name: str) -> None:
    """Refuse a name that no installed recipe has."""
    folder = files("fxprune").joinpath("recipes")
    known = [path.name.removesuffix(".txt") for path in folder.iterdir() if path.name.endswith(".txt")]
    if name not in known:
        raise UnknownNameError("recipe", name, known)


def check_quantization(quantization: str | None, out: Path | None) -> None:
    """Refuse a quantisation of what is no GGUF file, and one that cannot be written.

    Raises:
        ArgumentError: ``out`` is something else, or nothing.
        UnknownNameError: there is no such type.
    """
    if quantization is None:
        return
    if out is None or out.suffix != ".gguf":
        raise ArgumentError(
            "--quantization is for GGUF files", where="--quantization", remedy="Leave it out, or let --out end in .gguf"
        )
    from fxprune.export.gguf.format import type_named

    type_named(quantization)


def _passes(stage: str) -> tuple[str, ...]:
    """The installed passes of a stage, as the folders of the suite are called; those of other packages too."""
    suite = "fxprune.passes."
    entries = {entry.name: entry.module for entry in entry_points(group=_GROUP)}
    return tuple(
        name
        for name, module in entries.items()
        if not module.startswith(suite) or module.removeprefix(suite).startswith(stage)
    )


def _given(values: Values, name: str) -> bool:
    value = values.get(name)
    return value is not None and value is not False


def _check_together(values: Values) -> None:
    allowed = {"importance"} if (values.get("importance") or "") == "taylor" else set()
    if values.get("protect") == (0, 0):
        allowed.add("protect")
    for one, other, why in _APART:
        if other not in allowed and _given(values, one) and _given(values, other):
            raise ArgumentError(
                f"{option(one)} and {option(other)} cannot be given together: {why}",
                where=option(one),
                remedy="Leave one of them out",
            )
    if values.get("uniform") and values.get("ranking") == "global":
        raise ArgumentError(
            "--uniform and --ranking global cannot be given together: layers then differ",
            where="--uniform",
            remedy="Leave one of them out",
        )


def _check_names(values: Values) -> None:
    for name in _WORDS:
        check_word(name, values[name])
    if values["reduction"] is not None:
        from fxprune.removal.scores import REDUCTIONS

        if values["reduction"] not in REDUCTIONS:
            raise UnknownNameError("reduction", values["reduction"], REDUCTIONS)
    if values["kinds"] is not None:
        _check_kinds(values["kinds"])
    check_pass("importance", values["importance"])
    check_pass("compensate", values["compensate"], optional=True)
    check_pass("tune", values["tune"], optional=True)


def _check_kinds(text: str) -> None:
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind.removeprefix(EXACT) not in KINDS:
            raise UnknownNameError("kind", kind, KINDS)
    if len(set(kinds)) < len(kinds):
        raise ArgumentError(f"a kind comes twice in {text!r}", where="kinds", remedy="Name each once")


def _check_recipe(recipe: str | None) -> None:
    """Refuse a recipe that is not installed, no file, and no pipeline in text."""
    if recipe is None:
        return
    if recipe.endswith(".txt"):
        _check_recipe_file(Path(recipe))
    elif "," not in recipe and "\n" not in recipe:
        check_recipe_name(recipe)
    else:
        _check_steps(recipe)


def _check_recipe_file(path: Path) -> None:
    remedy = "Give a text file with a pass on each line, as `fxprune recipes balanced` prints one"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read: {error}"
        raise FxpruneError(what, where=str(path), remedy=remedy) from error
    if not any(line.strip() and not line.startswith("#") for line in text.splitlines()):
        raise FxpruneError("there is no pass in it", where=str(path), remedy=remedy)
    _check_steps(text)


def _check_arguments(name: str, arguments: Values) -> None:
    """Refuse arguments that a pass refuses, by its source."""
    if arguments:
        from fxprune.cli.unimported import check_spelled

        check_spelled(name, arguments)


def _check_steps(text: str) -> None:
    """Refuse a pipeline with a step that is no pass, or that the pass refuses."""
    for step in read_steps(text):
        if step.startswith("(") and step.endswith(")"):
            _check_steps(step[1:-1])
            continue
        name, arguments = read_spelling(step)
        check_pass_name(name)
        _check_arguments(name, arguments)


def _check_output(values: Values) -> None:
    out, low_memory = values["out"], values["low_memory"]
    check_quantization(values["quantization"], out)
    if low_memory and out is not None and is_file(out):
        raise ArgumentError(
            f"--low-memory writes a folder, and {out} is a file",
            where="--low-memory",
            remedy="Prune to a folder, and make the file of it with `fxprune export`",
        )
    if out is not None:
        check_output(out, values["model"], force=values["force"])
