"""Atomic replacement of folders: a reader sees the old folder or the new one, whole.

A new folder is filled beside its target, under a name that identifies the writing process, and then takes the place of
the target in one step if the system can exchange two names. If it cannot, there is a moment between two renames in
which the target is missing; a process that is killed then leaves the old folder under a name that
:func:`restore_replaced` finds.
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

__all__ = ["folder_identity", "linked_copy", "replace_folder", "resolve_target", "restore_replaced", "staging_folder"]

_RENAME_EXCHANGE = 2
"""Flag of Linux's ``renameat2``."""
_AT_FDCWD = -100
"""Paths are relative to the working directory of the process."""
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
"""Errors of kernels and file systems that cannot exchange names."""
_ATTEMPTS = 100
"""Other processes may write to the same target; an attempt only fails if another process succeeded."""
_OLD = ".old"


def resolve_target(folder: str | os.PathLike[str]) -> Path:
    """Resolve a folder; a symbolic link to it is followed, and stays a link when the folder is replaced."""
    return Path(os.path.realpath(Path(folder).expanduser()))


def folder_identity(folder: Path) -> tuple[int, int, int] | None:
    """Device, inode and change time of a folder, which differ once it is replaced; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` to fill; it is deleted at the end with its contents.

    Leftovers of killed processes are deleted first, and an old folder that one of them had moved away is put back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    restore_replaced(target)
    for path in _abandoned(target):
        shutil.rmtree(path, ignore_errors=True)
    work = _temporary_beside(target)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def replace_folder(work: Path, target: Path) -> None:
    """Put ``work`` in the place of ``target``; afterwards ``work`` is the old folder, or gone if there was none.

    If the system refuses (``OSError``), ``target`` is unchanged.
    """
    for _ in range(_ATTEMPTS):
        try:
            os.rename(work, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if not _exchanged(work, target):  # the system cannot: by two renames
                old = work.with_name(work.name + _OLD)
                os.rename(target, old)
                try:
                    os.rename(work, target)
                except OSError:
                    os.rename(old, target)
                    raise
                os.rename(old, work)
            return
        except FileNotFoundError:
            continue  # another process has just moved the old one away
    raise OSError(errno.EBUSY, "other processes keep replacing it", str(target))


@contextmanager
def linked_copy(folder: Path) -> Iterator[Path]:
    """Yield a second folder of hard links to the files of one that others may replace; it takes no space.

    Raises:
        FileNotFoundError: the folder was replaced while it was linked.
        OSError: nothing can be linked beside it.
    """
    place = resolve_target(folder)
    held = os.open(place, os.O_RDONLY)
    copy = _temporary_beside(place)
    try:
        for name in os.listdir(held):  # relative to the open folder, so all are of one, whatever has its name by now
            if not stat.S_ISDIR(os.stat(name, dir_fd=held).st_mode):
                os.link(name, copy / name, src_dir_fd=held)
        if not os.path.samestat(os.fstat(held), os.stat(place)):
            raise FileNotFoundError(errno.ENOENT, "it was replaced and may be deleted", str(place))
        yield copy
    finally:
        os.close(held)
        shutil.rmtree(copy, ignore_errors=True)


def restore_replaced(target: Path) -> None:
    """Put an old folder back that a killed process had moved away."""
    if target.exists():
        return
    for path in _abandoned(target):
        if path.name.endswith(_OLD):
            try:
                os.rename(path, target)
            except OSError:  # another process was faster
                continue
            return


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange two names; False if the system cannot."""
    call = _renameat2()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(b))


@cache
def _renameat2() -> Callable[..., int] | None:
    try:
        call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # no C library of this kind, or one without that call
        return None
    return call


def _temporary_beside(target: Path) -> Path:
    prefix = f".{target.name}.{socket.gethostname()}.{os.getpid()}."
    return Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))


def _abandoned(target: Path) -> list[Path]:
    """Temporary folders beside a target whose processes have ended, in order of their names."""
    prefix = f".{target.name}."
    try:
        found = sorted(path for path in target.parent.iterdir() if path.name.startswith(prefix))
    except OSError:
        return []
    return [path for path in found if not _may_be_running(path.name.removeprefix(prefix).removesuffix(_OLD))]


def _may_be_running(name: str) -> bool:
    """Whether the process in a name ``<host>.<pid>.<random>`` may still run; that of another host always may."""
    host, _, pid = name.rpartition(".")[0].rpartition(".")
    if host != socket.gethostname() or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs and belongs to another user
        return True
    return True
