"""Putting one folder in the place of another: whoever looks sees the old one or the new one, whole.

A new folder is filled beside its target, under a name that says who is at work, and then takes its place in one step
where the system can exchange two names. Where it cannot, there is a moment between two renames in which the target is
gone; a process that is killed in it leaves the old folder under a name that :func:`heal` finds.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

__all__ = ["heal", "identity", "put_in_place", "real_target", "snapshot", "staged"]

_EXCHANGE = 2
"""``RENAME_EXCHANGE`` of Linux's ``renameat2``."""
_HERE = -100
"""``AT_FDCWD``: paths are relative to where the process is."""
_UNABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
"""What a kernel or a file system says that does not exchange."""
_TURNS = 100
"""Others may put folders in the same place; a turn is lost only to one that succeeded."""
_OLD = ".old"


def real_target(folder: str | os.PathLike[str]) -> Path:
    """Return where a folder really is: a link to it is followed, and stays a link."""
    return Path(os.path.realpath(Path(folder).expanduser()))


def identity(folder: Path) -> tuple[int, int, int] | None:
    """Return what tells a folder from one that takes its place; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` to fill, and take it away in the end with what is in it.

    What processes that were killed have left there is taken away first, and an old folder that they took out of its
    place is put back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    heal(target)
    for path in _left_over(target):
        shutil.rmtree(path, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.{_who()}.", dir=target.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put_in_place(work: Path, target: Path) -> None:
    """Let ``work`` take the place of ``target``; ``work`` is the old folder afterwards, or gone where there was none.

    Raises:
        OSError: the system refuses; ``target`` is then what it was.
    """
    for _ in range(_TURNS):
        try:
            os.rename(work, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if not _exchanged(work, target):
                _replace(work, target)
            return
        except FileNotFoundError:
            continue  # another process has just taken the old one away
    raise OSError(errno.EBUSY, "others keep replacing it", str(target))


@contextmanager
def snapshot(folder: Path) -> Iterator[Path]:
    """Yield a second folder over the files of one that others may replace meanwhile; it takes no space.

    Raises:
        FileNotFoundError: the folder was taken away on the way.
        OSError: nothing can be linked beside it.
    """
    place = real_target(folder)
    held = os.open(place, os.O_RDONLY)
    copy = Path(tempfile.mkdtemp(prefix=f".{place.name}.{_who()}.", dir=place.parent))
    try:
        for name in os.listdir(held):  # all of one folder, whatever has its name by now
            if not stat.S_ISDIR(os.stat(name, dir_fd=held).st_mode):
                os.link(name, copy / name, src_dir_fd=held)
        if not os.path.samestat(os.fstat(held), os.stat(place)):
            raise FileNotFoundError(errno.ENOENT, "it was replaced, and may be on its way out", str(place))
        yield copy
    finally:
        os.close(held)
        shutil.rmtree(copy, ignore_errors=True)


def heal(target: Path) -> None:
    """Put an old folder back that a killed process had taken out of its place."""
    if target.exists():
        return
    for path in _beside(target):
        if path.name.endswith(_OLD) and not _at_work(path, target):
            try:
                os.rename(path, target)
            except OSError:  # another process was faster
                continue
            return


def _replace(work: Path, target: Path) -> None:
    """Two renames, for systems that cannot exchange; the old folder is put back where the second fails."""
    old = work.with_name(work.name + _OLD)
    os.rename(target, old)
    try:
        os.rename(work, target)
    except OSError:
        os.rename(old, target)
        raise
    os.rename(old, work)


def _exchanged(a: Path, b: Path) -> bool:
    """Whether the two have changed places; False where the system cannot do it."""
    call = _renameat2()
    if call is None:
        return False
    if call(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(b))


@cache
def _renameat2() -> Callable[..., int] | None:
    try:
        call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # no C library of this kind, or one without that call
        return None
    return call


def _who() -> str:
    return f"{socket.gethostname()}.{os.getpid()}"


def _beside(target: Path) -> list[Path]:
    """The hidden folders beside ``target`` that belong to it, in order of their names."""
    try:
        return sorted(path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}."))
    except OSError:
        return []


def _left_over(target: Path) -> list[Path]:
    return [path for path in _beside(target) if not _at_work(path, target)]


def _at_work(path: Path, target: Path) -> bool:
    """Whether the process that made ``path`` may still be there: one of another machine cannot be asked."""
    said = path.name.removeprefix(f".{target.name}.").removesuffix(_OLD)
    host, _, rest = said.rpartition(".")[0].rpartition(".")
    if host != socket.gethostname() or not rest.isdigit():
        return True
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there and belongs to someone else
        return True
    return True
