"""One ``torch.export`` a session for each module that is the same: tests trace the same tiny models hundreds of times.

A program depends on the code of a module, on its state and on what it is called with, and only on the shapes of its
weights, which are fake by then. All of that makes up the key; two modules share a program if nothing in it differs.
What cannot be written down (a lambda, a class made in a test) is exported as ever, and so is everything in the tests
of tracing itself. The graph that is made of a program belongs to its caller: lowering only reads programs.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from transformers import PreTrainedConfig, PreTrainedModel

_WHENCE = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version"}
"""Where a model was read from, which no forward asks."""


class Exports:
    """``torch.export.export`` with a memory.

    Attributes:
        fresh: whether to export anew, whatever is known.
        made: how many programs were exported, ``found``: how many were known.
    """

    def __init__(self, export: Callable[..., ExportedProgram]) -> None:
        self.fresh = False
        self.made = self.found = 0
        self._export = export
        self._known: dict[bytes, tuple[ExportedProgram, object]] = {}
        functools.update_wrapper(self, export)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> ExportedProgram:
        """The program of a module; of one that is the same where there was one."""
        key = None if self.fresh or isinstance(module, fx.GraphModule) else key_of(module, args, kwargs)
        known = self._known.get(key) if key is not None else None
        if known is not None and sizes_of(known[0]) == known[1]:
            self.found += 1
            return known[0]
        self.made += 1
        program = self._export(module, *args, **kwargs)
        if key is not None:
            self._known[key] = program, sizes_of(program)
        return program


def remember_exports() -> Exports:
    """Put the memory in the place of ``torch.export.export`` until the process ends; return it."""
    if not isinstance(torch.export.export, Exports):
        torch.export.export = Exports(torch.export.export)
    return torch.export.export


def sizes_of(program: ExportedProgram) -> object:
    """What is known about the sizes of a program that vary: a graph that fixes one fixes it for the program."""
    modes = (node.meta["val"].fake_mode for node in program.graph.nodes if isinstance(node.meta.get("val"), FakeTensor))
    env = next(modes).shape_env
    return None if env is None else (dict(env.replacements), dict(env.var_to_range), len(env.deferred_runtime_asserts))


def key_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
    """A digest of all that a program depends on; None if something has no name that a pickle could write."""
    code = {type(part): getattr(type(part).forward, "__wrapped__", type(part).forward) for part in module.modules()}
    modes = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
    )
    forwards = [id(function.__code__) for function in code.values() if hasattr(function, "__code__")]
    written = io.BytesIO()
    try:
        _Writer(written).dump((module, args, kwargs, modes, forwards))
    except (pickle.PicklingError, AttributeError, TypeError):  # what pickle raises for what it cannot write
        return None
    return hashlib.sha256(written.getvalue()).digest()


class _Writer(pickle.Pickler):
    """Writes modules with their state, fake tensors as shapes, other tensors with their values."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self._order: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        """A tensor: its shape and type, its values if it has any, and which of them it is, since some are tied."""
        if not isinstance(obj, torch.Tensor):
            return None
        place = self._order.setdefault(id(obj), len(self._order))
        shape = [int(size) for size in obj.shape], [int(step) for step in obj.stride()]
        told = (
            place,
            type(obj).__name__,
            isinstance(obj, nn.Parameter),
            shape,
            str(obj.dtype),
            str(obj.device),
            obj.requires_grad,
        )
        return (
            told
            if isinstance(obj, FakeTensor) or obj.is_meta
            else (*told, obj.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        )

    def reducer_override(self, obj: Any) -> Any:
        """A model and its config without where they were read from."""
        if isinstance(obj, PreTrainedModel | PreTrainedConfig):
            return (
                object.__new__,
                (type(obj),),
                {name: value for name, value in vars(obj).items() if name not in _WHENCE},
            )
        return NotImplemented
