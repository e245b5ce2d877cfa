"""Faults on demand: events of a run are counted, and then one of them fails, or the disk is full from one on."""

import builtins
import errno
import functools
import io
import json
import os
import resource
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxprune.errors import FxpruneError

__all__ = ["Fault", "Snapshot", "contents", "disk", "full_disk", "in_child", "ops", "put_back", "spread"]


class Own(Exception):
    """What a callback of the user raises."""


ERRORS: dict[str, Callable[[], BaseException]] = {
    "full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "full from then on": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "forbidden": lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    "no memory": MemoryError,
    "no device memory": lambda: torch.OutOfMemoryError("out of memory"),
    "interrupt": KeyboardInterrupt,
    "own": Own,
}

ALLOWED: dict[str, tuple[type[BaseException], ...]] = {
    "no memory": (MemoryError, FxpruneError),
    "no device memory": (torch.OutOfMemoryError, FxpruneError),
    "interrupt": (KeyboardInterrupt,),
    "own": (Own, FxpruneError),
}
"""What a fault may end in; those of disks in errors of this package alone."""


class Fault:
    """The ``at``-th event of a run fails by one of ``ERRORS``; with ``at=0`` events are counted and none fails."""

    def __init__(self, kind: str = "full", at: int = 0) -> None:
        self.kind, self.at, self.count, self.place = kind, at, 0, ""

    def event(self, name: str) -> None:
        self.count += 1
        lasting = self.kind == "full from then on" and name not in ("os.rename", "os.link", "ctypes.call_function")
        if self.at and (self.count == self.at or (lasting and self.count > self.at)):
            ours = [f for f in traceback.extract_stack() if "/fxprune/" in f.filename or "/passes/" in f.filename]
            self.place = self.place or f"{name} below {[f'{Path(f.filename).name}:{f.lineno}' for f in ours[-3:]]}"
            raise ERRORS[self.kind]()

    def track(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        """A callback for progress that fails."""
        for item in items:
            self.event(what)
            yield item

    def happens(self, act: Callable[[], object]) -> BaseException | None:
        """Run, and return what was raised: None if the run came to its end; anything that is not allowed fails."""
        allowed = ALLOWED.get(self.kind, (FxpruneError,))
        try:
            act()
        except allowed as error:
            assert self.place, f"without a fault: {error!r}"
            if isinstance(error, FxpruneError):
                assert self.kind != "own" or isinstance(error.__cause__, Own), f"{self}: {error!r}"
                assert error.what and error.remedy, f"{self}: {error!r}"
            return error
        except BaseException as error:
            raise AssertionError(f"{self}: {error!r} instead of {allowed}") from error
        return None

    def __str__(self) -> str:
        return f"{self.kind} at event {self.at}: {self.place}"


def spread(total: int, number: int) -> list[int]:
    """``number`` of the events 1 to ``total``, the first and the last among them; all of them if there are fewer."""
    if number >= total:
        return list(range(1, total + 1))
    return sorted({1 + round(i * (total - 1) / max(number - 1, 1)) for i in range(number)})


_watchers: list[Callable[[str, tuple[Any, ...]], None]] = []


@functools.cache
def _install() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        for watch in tuple(_watchers):
            watch(event, arguments)

    sys.addaudithook(hook)


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = ("os.rename", "os.link", "os.mkdir", "os.truncate")


class _Raw(io.FileIO):
    """A file each write to which is an event."""

    def __init__(self, fault: Fault, *arguments: Any, **options: Any) -> None:
        self.fault = fault
        super().__init__(*arguments, **options)

    def write(self, data: Any, /) -> int | None:
        self.fault.event("write")
        return super().write(data)


@contextmanager
def disk(fault: Fault, root: Path) -> Iterator[None]:
    """Everything that writes below ``root`` is an event: files opened, each write, renamed, linked, synced, folders."""
    _install()
    watched = _Disk(fault, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", watched.open)
        patch.setattr(io, "open", watched.open)
        patch.setattr(os, "fsync", watched.sync)
        patch.setattr(os, "posix_fallocate", watched.allocate)
        patch.setattr(safetensors.torch, "serialize_file", watched.save)
        _watchers.append(watched.watch)
        try:
            yield
        finally:
            _watchers.remove(watched.watch)


class _Disk:
    def __init__(self, fault: Fault, root: Path) -> None:
        self.fault, self.root, self.thread = fault, os.fsencode(root), threading.get_ident()
        self.true = io.open, os.fsync, os.posix_fallocate, safetensors.torch.serialize_file

    def inside(self, *paths: Any) -> bool:
        return any(os.fsencode(p).startswith(self.root) for p in paths if isinstance(p, str | bytes | os.PathLike))

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in _CHANGES or (event == "open" and bool((arguments[2] or 0) & _WRITES))
        paths = arguments[1] if event == "ctypes.call_function" else arguments if writes else ()
        if self.inside(*paths) and threading.get_ident() == self.thread:
            self.fault.event(event)

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+") or not self.inside(file):
            return self.true[0](file, mode, buffering, *rest, **options)
        raw: Any = _Raw(self.fault, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        held: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return held if "b" in mode else io.TextIOWrapper(held, *rest, **options)

    def sync(self, handle: int) -> None:
        if self.inside(os.readlink(f"/proc/self/fd/{handle}")):
            self.fault.event("fsync")
        self.true[1](handle)

    def allocate(self, *arguments: int) -> None:
        self.fault.event("allocate")
        self.true[2](*arguments)

    def save(self, *arguments: Any, **options: Any) -> None:
        self.fault.event("save_file")
        self.true[3](*arguments, **options)


class _Ops(TorchDispatchMode):
    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if type(leaf) in (torch.Tensor, nn.Parameter) and not leaf.is_meta]
        if made and not func.is_view and func is not torch.ops.aten.detach.default:  # views take no memory
            self.fault.event(str(func))
        return out


def ops(fault: Fault, root: Path | None = None) -> AbstractContextManager[object]:
    """Each op of torch that takes memory is an event."""
    return _Ops(fault)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes, whoever writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_child(act: Callable[[], object]) -> str:
    """Run in a forked process; "" if nothing was raised, else the class of the error; fails if the process crashed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        torch.set_num_threads(1)
        said = ""
        try:
            act()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
            known = isinstance(error, FxpruneError | MemoryError | KeyboardInterrupt | Own)
            said = said if known else f"raw {said} {traceback.format_exc()}"
        os.write(writer, said.encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"the process ended by {code}"
    assert not said.startswith("raw "), said
    return said


class Snapshot:
    """All that a user can see of a model, to compare it later; ``written`` if its tensors may be made again."""

    def __init__(self, model: nn.Module, *, written: bool = False) -> None:
        self.model, self.written, self.mode = model, written, torch.is_grad_enabled()
        self.taken = self._look()
        self.values = {name: value.detach().clone() for name, value in self._tensors()}

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        named = self.model.named_parameters(remove_duplicate=False), self.model.named_buffers(remove_duplicate=False)
        return [pair for pairs in named for pair in pairs]

    def _look(self) -> list[Any]:
        hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"
        modules = [
            (name, id(module), module.training, sorted(vars(module)), [len(getattr(module, hook)) for hook in hooks])
            for name, module in self.model.named_modules(remove_duplicate=False)
        ]
        tensors = [
            (name, t.requires_grad, t.grad is None, len(t._backward_hooks or ()), self.written or (id(t), t._version))
            for name, t in self._tensors()
        ]
        config = getattr(self.model, "config", None)
        return [modules, tensors, None if config is None else config.to_dict()]

    def check(self, where: object = "") -> None:
        for now, then in zip(self._look(), self.taken, strict=True):
            assert now == then, f"{where} {now} instead of {then}"
        assert torch.is_grad_enabled() == self.mode and not torch.is_inference_mode_enabled(), where
        for name, value in self._tensors():
            assert torch.equal(value.nan_to_num(), self.values[name].nan_to_num()), f"{name}, {where}"


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, and folders that are empty."""
    return {
        str(path.relative_to(root)): _content(path) if path.is_file() else b"folder"
        for path in sorted(root.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def _content(path: Path) -> bytes:
    """The bytes of a file; of safetensors with the header in order, which is another one each time."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    if path.suffix != ".safetensors" or len(raw) < 8:
        return raw
    header = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":"))
    return raw[:8] + header.encode().ljust(end - 8) + raw[end:]


def put_back(root: Path, held: dict[str, bytes]) -> None:
    """Make a folder hold these files alone."""
    if contents(root) == held:
        return
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in held.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
