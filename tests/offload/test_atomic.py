"""Atomic replacement: a reader sees the old file or folder or the new one, whatever happens to the writer."""

import errno
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune.checkpoint.manifest import MANIFEST, check_files, check_weights, read_manifest
from fxprune.checkpoint.read import from_pretrained
from fxprune.checkpoint.write import save_pretrained, write_folder
from fxprune.errors import CheckpointError
from fxprune.offload import atomic
from fxprune.offload.atomic import (
    atomic_path,
    folder_identity,
    holds_files,
    locked,
    replace_folder,
    resolve_target,
    restore_replaced,
    staging_folder,
    write_file,
)
from tests.checkpoint.small import narrow
from tests.tiers import tiers

WIDTHS = (16, 24)


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    """Two slim models that differ in a width."""
    return {width: narrow(width) for width in WIDTHS}


@pytest.fixture(params=tiers(["exchange", "two renames"], "exchange"))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without a system that exchanges two names."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    return str(request.param)


def width_of(folder: Path) -> int:
    """The width of the model in a folder, of which every byte is checked."""
    manifest = read_manifest(folder)
    check_weights(folder, manifest.weights, digests=True)
    check_files(folder, manifest)
    shape = next(iter(manifest.weights.values())).tensors["model.layers.1.mlp.up_proj.weight"]
    return int(shape[0])


def start(act: Callable[[], object]) -> int:
    """Run `act` in a forked process; return its id."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def succeeded(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def die_at(step: int) -> None:
    """Kill this process at its `step`-th look at the file system that may change it."""
    seen = [0]
    calls = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree", "tempfile.mkdtemp")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in (*calls, "ctypes.call_function"):
            if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
                return
            seen[0] += 1
            if seen[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name != folder.name]


@pytest.mark.parametrize(
    "first", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["over another", "into nothing"]
)
def test_a_process_killed_at_any_point_leaves_old_or_new(
    first: bool, way: str, models: dict[int, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "slim"
    old, new = WIDTHS
    for width in WIDTHS:
        save_pretrained(models[width], tmp_path_factory.getbasetemp() / f"{way}{first}{width}")

    def save(width: int) -> None:
        source = tmp_path_factory.getbasetemp() / f"{way}{first}{width}"
        write_folder(folder, lambda work: shutil.copytree(source, work, dirs_exist_ok=True))

    if not first:
        save(old)
    outcomes = []
    for step in range(1, 400):

        def act(step: int = step) -> None:
            die_at(step)
            save(new)

        done = succeeded(start(act))
        restore_replaced(folder)
        outcomes.append(width_of(folder) if folder.exists() else None)
        if done:
            break
        if outcomes[-1] == new:
            save(old)
            assert leftovers(folder) == [], "leftovers of the dead are deleted"
    assert done and len(outcomes) > 10
    assert set(outcomes) <= {old, new, *([None] if first else [])} and outcomes[-1] == new
    assert leftovers(folder) == []


def test_a_reader_beside_writers_sees_old_or_new(models: dict[int, Any], tmp_path: Path) -> None:
    folder = tmp_path / "slim"
    save_pretrained(models[WIDTHS[0]], folder)
    until = time.monotonic() + float(os.environ.get("FXPRUNE_RACE_SECONDS", "2"))
    wanted = {width: models[width].model.layers[1].mlp.up_proj.weight for width in WIDTHS}

    def write(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < until:
            save_pretrained(models[draw.choice(WIDTHS)], folder)

    writers = [start(lambda seed=seed: write(seed)) for seed in range(2)]
    seen = set()
    while time.monotonic() < until:
        weight = from_pretrained(folder, verify=True).model.layers[1].mlp.up_proj.weight
        assert torch.equal(weight, wanted[len(weight)])
        seen.add(len(weight))
    assert all(map(succeeded, writers))
    assert seen <= set(WIDTHS) and leftovers(folder) == []


def test_the_old_folder_comes_back_where_the_new_one_cannot_be_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    old, new = tmp_path / "target", tmp_path / ".target.host.1.x"
    old.mkdir()
    new.mkdir()
    (old / "file").write_text("old")
    rename, calls = os.rename, []

    def refuse(source: Path, target: Path) -> None:
        calls.append(source)
        if source == new and len(calls) > 1:
            raise PermissionError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        replace_folder(new, old)
    assert (old / "file").read_text() == "old" and {path.name for path in tmp_path.iterdir()} == {old.name, new.name}


def test_what_is_at_work_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "slim"
    with staging_folder(target) as work:
        foreign = tmp_path / ".slim.another-machine.1.abc"
        foreign.mkdir()
        with staging_folder(target) as other:
            assert work.is_dir() and foreign.is_dir() and other != work
    assert not work.exists() and foreign.is_dir()
    (tmp_path / f".slim.{atomic.socket.gethostname()}.999999999.abc").mkdir()
    with staging_folder(target):
        assert {path.name for path in tmp_path.iterdir()} >= {foreign.name}
    assert {path.name for path in tmp_path.iterdir()} == {foreign.name}


def test_a_link_is_followed_and_files_of_others_are_kept(models: dict[int, Any], tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(tmp_path / "slim")
    save_pretrained(models[16], link)
    before = folder_identity(tmp_path / "slim")
    (link / "README.md").write_text("mine")
    (link / "notes").mkdir()
    (link / "notes" / "a.txt").write_text("more")
    (link / "plan.json").write_text("{}")
    save_pretrained(models[24], link)
    assert link.is_symlink() and resolve_target(link) == tmp_path / "slim" and folder_identity(link) != before
    assert width_of(link) == 24
    assert (link / "README.md").read_text() == "mine" and (link / "notes/a.txt").read_text() == "more"
    assert from_pretrained(link).model.layers[1].mlp.up_proj.out_features == 24


def test_single_edits_are_refused_or_change_nothing(models: dict[int, Any], tmp_path: Path) -> None:
    """One bit changed, one file more: refused by ``verify=True``, or the same weights."""
    folder = tmp_path / "slim"
    save_pretrained(models[24], folder)
    wanted, refused = models[24].state_dict(), set[str]()
    held = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = ["model.safetensors.index.json", "pytorch_model.bin", "a.safetensors", "extra.py", "x.txt"]
    edits = dict.fromkeys(others, held[MANIFEST])
    for name, raw in held.items():
        at = len(raw) // 2
        edits[name] = raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]
    for name, raw in edits.items():
        (folder / name).write_bytes(raw)
        try:
            found = from_pretrained(folder, verify=True).state_dict()
        except CheckpointError:
            refused.add(name)
        else:
            assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        if name in held:
            (folder / name).write_bytes(held[name])
        else:
            (folder / name).unlink()
    assert refused == edits.keys() - {"README.md", "x.txt"}


def test_a_file_takes_its_place_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_file(path, "one")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
    for error in (OSError(28, "no room"), KeyboardInterrupt(), MemoryError(), ValueError()):
        kind = CheckpointError if isinstance(error, OSError) else type(error)
        with pytest.raises(kind), atomic_path(path, CheckpointError) as unfinished:
            unfinished.write_text("half")
            raise error
        assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match="cannot be written: No such file"), atomic_path(path, CheckpointError):
        pass  # nothing was written
    long = tmp_path / f"{'x' * 240}.html"
    write_file(long, "two")
    assert long.read_text() == "two"


def test_a_new_file_has_the_permissions_of_any_other_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "path"
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            plain.write_text("")
            write_file(path, "")
        finally:
            os.umask(before)
        assert path.stat().st_mode == plain.stat().st_mode
        path.unlink()
        plain.unlink()
    write_file(path, "")
    path.chmod(0o640)
    write_file(path, "new")
    assert path.stat().st_mode & 0o777 == 0o640


def test_links_folders_pipes_and_circles_are_what_they_are_to_open(tmp_path: Path) -> None:
    """A report written to a link replaced the link; one written to a device must not replace the device."""
    target, link = tmp_path / "elsewhere" / "a.html", tmp_path / "link.html"
    target.parent.mkdir()
    link.symlink_to(target)
    for text in ("new", "newer"):  # the link first leads nowhere
        write_file(link, text)
        assert link.is_symlink() and target.read_text() == text
    write_file(os.devnull, "gone")
    assert Path(os.devnull).is_char_device()
    reader, writer = os.pipe()
    write_file(f"/dev/fd/{writer}", "through")
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == "through"
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    for path in (circle, target.parent, tmp_path / "no" / "x", target / "x"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            write_file(path, "x", CheckpointError)
    assert circle.is_symlink() and list(target.parent.iterdir()) == [target] and target.read_text() == "newer"


def test_folders_are_made_and_deleted_again_if_nothing_comes_into_them(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x"
    with pytest.raises(KeyboardInterrupt), atomic_path(path, parents=True):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    write_file(path, "x", parents=True)
    assert path.read_text() == "x"


@pytest.mark.parametrize("fails", ["data", "model", ""])
def test_a_model_and_the_weights_beside_it_are_replaced_together(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights were replaced before the model, which stayed if that failed; old weights stayed for ever."""
    path, data, rename = tmp_path / "model", tmp_path / "model.data", os.replace
    path.write_text("old")
    data.write_text("old data")

    def refuse(source: Path, target: Path) -> None:
        if target == {"data": data, "model": path}.get(fails) and source.parent.name.startswith("."):
            raise OSError(28, "no room")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    for further in (True, False):
        with (
            pytest.raises(CheckpointError) if fails == "model" or (fails and further) else nullcontext() as failed,
            atomic_path(path, CheckpointError, companions=(".data",)) as unfinished,
        ):
            unfinished.write_text("new")
            if further:
                unfinished.with_name("model.data").write_text("new data")
        if failed is not None:
            assert (path.read_text(), data.read_text()) == ("old", "old data")
        else:
            assert path.read_text() == "new" and data.exists() == further
        assert {file.name for file in tmp_path.iterdir()} <= {"model", "model.data"}


def test_one_run_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    file = tmp_path / "_lock"
    with locked(file, CheckpointError):
        assert not holds_files(tmp_path), "of a run that is killed now"
        with pytest.raises(CheckpointError, match="another run uses"), locked(file, CheckpointError):
            raise AssertionError("it began")
    with pytest.raises(KeyboardInterrupt), locked(file, CheckpointError):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    file.mkdir()
    with pytest.raises(CheckpointError, match="_lock: cannot be written"), locked(file, CheckpointError):
        raise AssertionError("it began")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_nothing_is_locked_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(self: Any, **_: Any) -> None:
        (tmp_path / "_lock").touch()
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.FileLock, "acquire", refuse)
    with locked(tmp_path / "_lock", CheckpointError):
        assert list(tmp_path.iterdir()) == []
