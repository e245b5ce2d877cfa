"""Atomic replacement of files and folders: a reader sees the old one or the new one, whole.

What is new is written beside its target, under a name that identifies the writing process, and then takes the place of
the target in one step: a file by a rename, a folder if the system can exchange two names. If it cannot, there is a
moment between two renames in which the folder is missing; a process that is killed then leaves the old folder under a
name that :func:`restore_replaced` finds.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fxprune.errors import FxpruneError

LOCK = "_lock"
"""Name of the lock in a folder that one run at a time may use; transformers uploads no file of such a name."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems that have no locks, as some in a network."""

_OLD = ".old"


def write_file(
    path: str | os.PathLike[str], data: str | bytes, error: type[FxpruneError] = FxpruneError, *, parents: bool = False
) -> None:
    """Write a file as by :func:`atomic_path`."""
    with atomic_path(path, error, parents=parents) as unfinished:
        unfinished.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_path(
    path: str | os.PathLike[str],
    error: type[FxpruneError] = FxpruneError,
    *,
    parents: bool = False,
    companions: Iterable[str] = (),
) -> Iterator[Path]:
    """Yield a temporary path to write to; the file written there then takes the place of ``path`` in one step.

    Files written beside it go along, before it: what it refers to is then in place. If anything is raised, all files
    stay as they were. A link stays a link, and a file keeps its permissions.

    Args:
        path: the file to write.
        error: class of the error that errors of the disk become.
        parents: make the folder of ``path`` if it is missing.
        companions: endings of files named after ``path``, which belong to it: old ones are deleted if there are no
            new ones.
    """
    path = Path(path)
    with wrap_disk_errors(path, error):
        target = Path(os.path.realpath(path))
        if path.exists() and not path.is_file() and not path.is_dir():
            yield path  # a pipe or a device cannot be replaced
            return
        if target.is_dir() or target.is_symlink() or (target.exists() and not os.access(target, os.W_OK)):
            target.open("ab").close()  # raises what writing to it raises
        with staging_folder(target, parents=parents) as work:
            new = work / path.name
            yield new
            finish_files(work)
            places = {file: path.with_name(file.name) for file in work.iterdir() if file != new} | {new: target}
            for file, place in places.items():
                if place.exists():
                    _set_mode(file, stat.S_IMODE(place.stat().st_mode))
            _move(places, Path(tempfile.mkdtemp(dir=work)))
            for stale in {path.with_name(path.name + ending) for ending in companions}.difference(places.values()):
                with suppress(OSError):
                    stale.unlink()


def _move(places: dict[Path, Path], old: Path) -> None:
    """Move files to their places, the last one in one step; if that fails, put the others back."""
    *first, (new, target) = places.items()
    try:
        for file, place in first:
            if place.is_file():
                os.rename(place, old / file.name)
            os.replace(file, place)
        os.replace(new, target)
    except BaseException:  # an interrupt too must leave all as they were
        for file, place in first:
            if (old / file.name).exists():
                os.replace(old / file.name, place)
            elif not file.exists():
                place.unlink()
        raise


def finish_files(folder: Path) -> None:
    """Write the files in a folder through to the disk, and give them the permissions of any new file.

    Some errors of disks show only then, and temporary folders and mapped files are made for their owner alone.
    """
    mask = os.umask(0)
    os.umask(mask)
    _set_mode(folder, 0o777 & ~mask)
    for path in folder.iterdir():
        if path.is_file():
            _set_mode(path, 0o666 & ~mask)
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _set_mode(path: Path, mode: int) -> None:
    with suppress(PermissionError):  # a file system without permissions
        path.chmod(mode)


@contextmanager
def wrap_disk_errors(path: str | os.PathLike[str], error: type[FxpruneError]) -> Iterator[None]:
    """Turn errors of the disk into one of class ``error``."""
    try:
        yield
    except (OSError, SafetensorError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        remedy = "Choose a file or folder that can be written to, on a disk with enough room"
        raise error(f"cannot be written: {reason}", where=os.fspath(path), remedy=remedy) from cause


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; if an error occurs, those that were made and are empty are deleted."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:  # whatever was raised, nothing came into them
        for path in made:
            with suppress(OSError):  # not made, or another process writes there
                path.rmdir()
        raise


@contextmanager
def locked(file: Path, error: type[FxpruneError]) -> Iterator[None]:
    """Hold a lock against other runs, by a file that is deleted at the end. A run that was killed holds none.

    On file systems without locks nothing is locked.

    Raises:
        FxpruneError: another run holds it, or the file cannot be written; of the type ``error``.
    """
    lock = FileLock(file, blocking=False)
    try:
        with wrap_disk_errors(file, error):
            try:
                lock.acquire()
            except Timeout:
                what = "another run uses the folder, and holds this lock"
                remedy = "Wait until it is done, or name another folder"
                raise error(what, where=os.fspath(file), remedy=remedy) from None
            except OSError as cause:
                if cause.errno not in _NO_LOCKS:
                    raise
                file.unlink(missing_ok=True)
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # where a file in use cannot be deleted, it stays
                file.unlink()
            lock.release()


def holds_files(folder: Path) -> bool:
    """Whether a folder holds anything but the lock of a run."""
    return any(path.name != LOCK for path in folder.iterdir())


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
def staging_folder(target: Path, *, parents: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` to fill; it is deleted at the end with its contents.

    Leftovers of killed processes are deleted first, and an old folder that one of them had moved away is put back.
    """
    with made_folder(target.parent) if parents else nullcontext():
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
    for _ in range(100):  # an attempt only fails if another process that writes to the same target succeeded
        try:
            os.rename(work, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with suppress(FileNotFoundError):  # another process has just moved the old one away
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
            with suppress(OSError):  # another process was faster
                os.rename(path, target)
                return


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange two names; False if the system cannot."""
    call = _renameat2()
    if call is None:
        return False
    here, exchange = -100, 2  # paths relative to the working directory; the flag of Linux's renameat2
    if call(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):  # of kernels and file systems without this
        return False
    raise OSError(code, os.strerror(code), str(b))


@cache
def _renameat2() -> Callable[..., int] | None:
    with suppress(OSError, AttributeError, TypeError):  # no C library of this kind, or one without that call
        call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
        return call
    return None


def _temporary_beside(target: Path) -> Path:
    prefix = f"{_prefix(target)}{socket.gethostname()}.{os.getpid()}."
    return Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))


def _prefix(target: Path) -> str:
    name = os.fsencode(target.name)  # file systems allow some 255 bytes
    return f".{target.name if len(name) <= 100 else hashlib.sha256(name).hexdigest()}."


def _abandoned(target: Path) -> list[Path]:
    """Temporary folders beside a target whose processes have ended, in order of their names."""
    prefix = _prefix(target)
    try:
        found = sorted(path for path in target.parent.iterdir() if path.name.startswith(prefix))
    except OSError:
        return []
    left = []
    for path in found:
        name = path.name.removeprefix(prefix).removesuffix(_OLD)  # <host>.<pid>.<random>
        host, _, pid = name.rpartition(".")[0].rpartition(".")
        if host == socket.gethostname() and pid.isdigit() and not psutil.pid_exists(int(pid)):
            left.append(path)
    return left
