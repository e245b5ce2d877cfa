"""The documentation against the code: its snippets run, its tables are what is registered, its commands exist."""

import copy
import importlib
import json
import re
import shlex
import shutil
import socket
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
from click.testing import CliRunner
from transformers import logging

import fxprune
from fxprune.errors import PassError
from fxprune.pipeline import registry as passes_by_name
from fxprune.pipeline.arguments import read_spelling
from fxprune.pipeline.registry import load_pass, pass_names
from fxprune.recipes import option_table
from fxprune.recipes import recipe as recipe_module
from fxprune.recipes.recipe import Recipe
from fxprune.rules import registry as rules_by_op
from tests import reference_tables
from tests.cli.running import COMMAND
from tests.export.small import tokenizer as byte_tokenizer
from tests.models import tiny, token_ids
from tests.tokens import TEMPLATE

ROOT = Path(__file__).parents[1]
WRITTEN_BY_COMMANDS = {
    "docs/coverage.md",
    "docs/families.md",
    "docs/latency.md",
    "docs/options.md",
    "docs/quality.md",
    "docs/results.md",
    "docs/rules.md",
}
PAGES = tuple(
    name
    for name in ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
    if name not in WRITTEN_BY_COMMANDS
)

START = "docs/quickstart.md"
"""Its first snippet makes ``model``, ``tokenizer``, ``calibration`` and ``result``; other pages go on from there."""

NOT_RUN = {
    ("docs/recovery.md", "two texts and the tasks of the paper come from the hub"),
    *(
        ("docs/serving.md", f"it needs {package}, with which tests/end_to_end/test_quantised.py runs it")
        for package in ("torchao", "llmcompressor")
    ),
}
"""Snippets that cannot run here, with the reason that stands in a comment above them."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page: its page.
        line: the line of its fence.
        language: what the fence says.
        text: what is in it.
        reason: why it does not run here; empty if it does.
        printed: what the page says it prints; None where it says nothing.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str = ""
    printed: str | None = None


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, language: str) -> list[Block]:
    """The blocks of a page in one language, in order."""
    reason, output = r"(?:^<!-- not run: ([^\n]+) -->\n)?", r"(?:\n+```text\n(.*?)^```$)?"
    fenced = re.compile(reason + r"^```(\w+)\n(.*?)^```$" + output, re.M | re.S)
    text = text_of(page)
    return [
        Block(page, text[: m.start(2)].count("\n") + 1, m[2], m[3], m[1] or "", m[4])
        for m in fenced.finditer(text)
        if m[2] == language
    ]


def run(block: Block, names: dict[str, Any], printed: pytest.CaptureFixture[str] | None = None) -> None:
    """Run a block, at its own line of its page for tracebacks; what it prints is what the page says."""
    code = compile("\n" * block.line + block.text, block.page, "exec", dont_inherit=True)
    if printed is not None:
        printed.readouterr()
    exec(code, names)
    if printed is not None and block.printed is not None:
        assert printed.readouterr().out == block.printed, f"{block.page}:{block.line}"


def furnish(folder: Path) -> None:
    """Put into a folder what the pages speak of: a model with its tokenizer, texts, rows and questions."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4}
    tiny("llama", num_hidden_layers=2, **sizes).save_pretrained(folder / "path/to/model")
    tokenizer = copy.copy(byte_tokenizer())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "path/to/model")
    fxprune.export_model(tiny("llama", num_hidden_layers=2), folder / "dense.gguf", tokenizer=byte_tokenizer())
    (folder / "some.txt").write_text(text_of("docs/design.md"))
    (folder / "held-out.txt").write_text(text_of("docs/checkpoints.md")[:1500])
    rows = [{"instruction": f"What is {i} and one?", "output": f"It is {i + 1}."} for i in range(16)]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    question = {"query": "Two and two is", "choices": [" four", " five"], "gold": 0}
    (folder / "piqa.jsonl").write_text(json.dumps(question))
    ids = "\n".join(json.dumps({"input_ids": row}) for row in token_ids(4, 16).tolist())
    (folder / "samples.jsonl").write_text(ids)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and no rule of a page is left behind."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a snippet asks for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = dict(rules_by_op._RULES)
    yield
    rules_by_op._RULES.clear()
    rules_by_op._RULES.update(before)


_READ = recipe_module.read_recipe


def read_quick_recipe(name: str) -> Recipe:
    """The recipe ``fast`` on eight samples in place of those that tune; what others spell is on the pages."""
    if name not in ("balanced", "best"):
        return _READ(name)
    return Recipe(name, re.sub(r"calibrate\{.*?\}", "calibrate{samples=8, written=8}", str(_READ("fast"))))


def read_short_recipe(name: str) -> Recipe:
    """A recipe, the default one with fewer samples that the model writes."""
    return Recipe(name, str(_READ(name)).replace("written=384, added=200", "written=24, added=12"))


RECIPES = {"quick": read_quick_recipe, "short": read_short_recipe, "default": _READ}


@pytest.fixture(scope="module")
def start(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder with everything; for pages that go on from ``START``, the names that its first snippet makes."""
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("docs")
    furnish(folder)
    names: dict[str, Any] = {"__name__": "start"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_module, "read_recipe", RECIPES[request.param])
        if request.param == "short":
            with pytest.MonkeyPatch.context() as inner:
                inner.chdir(folder)
                run(blocks_of(START, "python")[0], names)
        yield folder, names


# ------------------------------------------------------------------------------------------------------- snippets


SECOND = [
    pytest.param("default" if page == "README.md" else "short", page, marks=pytest.mark.slow)
    for page in PAGES
    if blocks_of(page, "python")
]


@pytest.mark.parametrize(
    ("start", "page"),
    [("quick", "README.md"), *SECOND],  # in the second tier all pages, by the default recipe
    indirect=["start"],
    scope="module",  # else the fixture is made anew for each page
)
def test_the_snippets_of_a_page_run(
    start: tuple[Path, dict[str, Any]],
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, names = start
    module = ModuleType("page")  # as in a script, so that classes of the page know their module
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module).update({} if page == "README.md" else {**names, "__name__": "page"})
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    snippets = blocks_of(page, "python")
    here = [block for block in (snippets[1:] if page == START else snippets) if not block.reason]
    assert here, "no snippet of this page runs"
    for block in here:
        run(block, vars(module), capsys)


def test_few_snippets_do_not_run_and_each_says_why() -> None:
    found = [block for page in PAGES for block in blocks_of(page, "python")]
    assert {(block.page, block.reason) for block in found if block.reason} == NOT_RUN
    assert len(found) > 30
    for block in found:
        compile(block.text, block.page, "exec", dont_inherit=True)


# ---------------------------------------------------------------------------------------------------------- tables


def table_of(page: str, *head: str) -> list[tuple[str, ...]]:
    """The rows of the table of a page that has this head."""
    lines = text_of(page).splitlines()
    at = lines.index(f"| {' | '.join(head)} |")
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(tuple(cell.strip() for cell in line.strip("|").split("|")))
    return rows


def test_the_changelog_lists_the_deprecated_options_with_what_replaces_them() -> None:
    rows = table_of("CHANGELOG.md", "deprecated", "write")
    deprecated = {name for name, (_, one) in option_table().items() if one.doc.startswith("Deprecated")}
    assert {old.strip("`").partition("=")[0] for old, _ in rows} == deprecated
    for _, new in rows:
        ((stage, spelling),) = eval(f"dict({new.strip('`')})").items()
        assert read_spelling(spelling)[0] in pass_names(stage)


def table_under(page: str, heading: str) -> dict[str, str]:
    """Lines of the first table under a heading, or a part of one, by their first cell."""
    table = text_of(page).partition(heading)[2].partition("\n###")[0]
    return {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}


def test_the_figures_of_the_readme_are_those_of_the_page_of_quality() -> None:
    """The default recipe and the paper's method at 20%: perplexity over dense, and how often tokens agree."""
    rows = table_under("docs/quality.md", "### ")
    readme = " ".join(text_of("README.md").split())
    for name in ("balanced", "llm-pruner"):
        mean, same = re.findall(r"x[\d.]+(?= ±)|\d+%(?= \|$)", rows[name])
        assert mean in readme and same in readme, f"{name}: {mean}, {same}"
    assert re.findall(r"x[\d.]+ to x[\d.]+", rows["balanced"])[0] in readme
    mean = re.findall(r"x[\d.]+(?= ±)", table_under("docs/quality.md", "20% removed, on whole texts")["balanced"])[0]
    assert f"{mean} over the whole of them" in readme


def test_tables_of_options_passes_and_facts_are_those_declared() -> None:
    """After a change of a declaration: `python -m tests.reference_tables`."""
    assert reference_tables.options_page() == reference_tables.OPTIONS.read_text(encoding="utf-8")
    assert reference_tables.passes_page() == reference_tables.PASSES.read_text(encoding="utf-8")


def test_the_reference_has_every_public_name() -> None:
    first = text_of("docs/reference.md").split("::: ")[1]
    assert set(re.findall(r"^ +- (\w+)$", first, re.M)) == set(fxprune.__all__)


# ----------------------------------------------------------------------------------------------- names and commands


def named(dotted: str) -> Any:
    """What a dotted name stands for."""
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(dotted)


def spans(page: str) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S))


@pytest.mark.parametrize("page", PAGES)
def test_names_and_files_exist(page: str) -> None:
    for span in spans(page):
        dotted = re.match(r"fxprune(\.\w+)+", span)
        if dotted and not span.endswith(".json"):
            named(dotted[0])
        if re.fullmatch(r"(fxprune|passes|tests|docs|benchmarks)/[\w./]*", span):
            assert (ROOT / span).exists(), f"{page}: {span}"
    for link in re.findall(r"\]\((?!http)([^)#]+)", text_of(page)):
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def commands(page: str) -> list[list[str]]:
    """The commands of a page: in blocks, in indented lines and in the text, each as its words."""
    text = text_of(page).replace("\\\n", " ")
    shell = "\n".join(re.findall(r"^```(?:sh|bash|console)\n(.*?)^```$", text, re.M | re.S))
    lines = [*shell.splitlines(), *re.findall(r"^    ((?:make|fxprune) .*)$", text, re.M), *spans(page)]
    told = [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?(make|fxprune|pip install) ", line)]
    return [shlex.split(line, comments=True) for line in told]


def check_make(words: list[str]) -> None:
    """Refuse a target or a variable that the Makefile does not have."""
    makefile = text_of("Makefile")
    for word in words:
        name, equals, _ = word.partition("=")
        wanted = rf"^{name}\s+\?=" if equals else rf"^{name}:.*##"
        assert re.search(wanted, makefile, re.M), f"make {word}"


def check_fxprune(words: list[str]) -> None:
    """Refuse a command or an option that there is not."""
    command: Any = COMMAND
    rest = iter(words)
    while hasattr(command, "commands") and (name := next(rest, None)):  # a page may name a group alone
        command = command.commands[name]
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("--")} <= options, words


def check_pip(words: list[str]) -> None:
    """Refuse an extra of this package that there is not."""
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    for word in words:
        found = re.fullmatch(r"(?:fxprune|\.)\[(.+)\]", word)
        assert found is None or set(found[1].split(",")) <= set(extras), word


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    for words in commands(page):
        {"make": check_make, "fxprune": check_fxprune, "pip": check_pip}[words[0]](words[1:])


def test_there_are_commands_to_check() -> None:
    assert len([words for page in PAGES for words in commands(page)]) > 20
    for check, words in ((check_make, ["nothing"]), (check_fxprune, ["prune", "--nothing"]), (check_pip, [".[none]"])):
        with pytest.raises(AssertionError):
            check(words)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["short"], indirect=True)
def test_the_commands_of_their_page_run_one_after_the_other(
    start: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comment says what ends in 1."""
    shutil.copytree(start[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shown = [block.text.replace("\\\n", " ") for block in blocks_of("docs/commands.md", "sh")]
    lines = [line for text in shown for line in text.splitlines() if line.startswith("fxprune ")]
    told = {shlex.split(line)[1] for line in lines}
    for name in ("start_server", "wait"):
        monkeypatch.setattr(f"fxprune.cli.serve.{name}", MagicMock())
    assert told == set(COMMAND.commands), "every command is shown"
    for line in lines:
        result = CliRunner().invoke(COMMAND, shlex.split(line, comments=True)[1:])
        assert result.exit_code == ("# ends in 1" in line), f"{line}\n{result.output}"


# ---------------------------------------------------------------------------------------------------------- plug-ins


def test_an_entry_point_is_shown_as_it_is_written() -> None:
    (block,) = blocks_of("docs/passes.md", "toml")
    entries = tomllib.loads(block.text)["project"]["entry-points"][passes_by_name._GROUP]
    assert all(re.fullmatch(r"[\w.]+:\w+Pass", value) for value in entries.values())


def test_a_broken_plug_in_is_told_as_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("squared-gradient", "mylib.pruning:SquaredGradientPass", passes_by_name._GROUP)
    known = dict(passes_by_name._entries())
    monkeypatch.setattr(passes_by_name, "_entries", lambda: {**known, "squared-gradient": entry})
    assert "squared-gradient" in pass_names() and "squared-gradient" not in pass_names("importance")
    with pytest.raises(PassError) as caught:
        load_pass("squared-gradient")
    assert f"\n{caught.value}\n" in text_of("docs/passes.md")


def test_a_pass_on_a_page_is_a_frozen_dataclass() -> None:
    """What the pages show of passes keeps the contract in form, too."""
    code = "\n".join(block.text for page in PAGES for block in blocks_of(page, "python"))
    classes = re.findall(r"(@dataclass.*)\nclass (\w+Pass)\(", code)
    assert len(classes) >= 2
    assert {decorator for decorator, _ in classes} == {"@dataclass(frozen=True, eq=False)"}
