"""One trace a run of pytest for each model that is the same, and one ``torch.export`` for those of other weights.

A program depends on the code of a module, on its state and on what it is called with, and only on the shapes of its
weights, which are fake by then; and on modes of torch. All of that makes up the key. Two modules share a program if
nothing in it differs: a function that a test puts in the place of another one is another function here.

What is not known to be the same is exported as ever: code of a page or of one test, whatever has no name that a pickle
could write, and everything in the tests of tracing itself. The graph that is made of a program belongs to its caller:
lowering only reads programs, and a program about whose sizes something was found out since is not given again. The key
of a trace holds the values of the weights as well, and what is known is bound to the weights of the model at hand.
"""

import copy
import functools
import hashlib
import io
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.mutation_guard import install_generation_tagging_init
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from transformers import PreTrainedConfig

from fxprune.graph.facts import Source, facts_of, set_facts
from fxprune.graph.tensors import get_tensor, weights
from fxprune.trace import capture
from fxprune.trace.capture import Traced

_LASTING = {*sys.stdlib_module_names, "torch", "transformers", "huggingface_hub", "peft", "fxprune"} - {"__main__"}
"""The packages whose code stays as it is while tests run, but for what tests patch."""

_CALLED = ("torch", "torch.nn.functional", "torch.utils.checkpoint")
"""What forwards of all kinds call, beside what is around them and transformers' own helpers."""

_WORKED_OUT = {"_can_set_attn_implementation_cached_value", "__slotnames__"}
"""What transformers and copies write to classes: it follows from their code."""

_WHENCE = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version"}
"""Where a model was read from, which no forward asks."""

_LOCAL_CLASSES: dict[int, type] = {}
"""Classes made within functions, as those of ``kernels`` around the functions of transformers, each by its identity."""

_LARGEST = 2_000_000
"""Parameters of a model whose weights are read to recognise it."""


class Exports:
    """``torch.export.export`` with a memory.

    Attributes:
        fresh: whether to export anew, whatever is known.
        made: how many programs were exported, ``found``: how many were known.
        export: torch's own function.
    """

    def __init__(self, export: Callable[..., ExportedProgram]) -> None:
        self.fresh = False
        self.made = self.found = 0
        self.export = export
        self._known: dict[object, tuple[ExportedProgram, object]] = {}
        self._first: dict[object, dict[str, object]] = {}
        self._held: dict[int, object] = {}
        functools.update_wrapper(self, export)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> ExportedProgram:
        """The program of a module; of one that is the same where there was one."""
        key = None if self.fresh or isinstance(module, fx.GraphModule) else self.key_of(module, args, kwargs)
        program, sizes = self._known.get(key, (None, None)) if key is not None else (None, None)
        if program is not None and sizes_of(program) == sizes:
            self.found += 1
            return _with_constants_of_its_own(program)
        self.made += 1
        program = self.export(module, *args, **kwargs)
        if key is None:
            return program
        self._known[key] = program, sizes_of(program)
        return _with_constants_of_its_own(program)

    def key_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """All that a program depends on; None if something of it may change unseen."""
        state = digest_of(module, args, kwargs)
        if state is None:
            return None
        digest, code = state
        return digest, modes(), self._patched(code)

    def _patched(self, code: tuple[type | FunctionType, ...]) -> frozenset[tuple[object, str, int]]:
        """What is not as it was when it was first seen: where, its name, and which object it is now."""
        patched = []
        for owner, names in namespaces(code):
            first = self._first.setdefault(owner, dict(names))
            for name, value in names.items():
                if name not in first and not isinstance(owner, type):  # a class may inherit what has this name
                    first[name] = value
                if first.get(name) is not value:
                    self._held[id(value)] = value  # an id stands for its object as long as that is there
                    patched.append((owner, name, id(value)))
            patched += [(owner, name, 0) for name in first.keys() - names.keys()]
        return frozenset(patched)


def remember_exports() -> Exports:
    """Put the memory in the place of ``torch.export.export`` until the process ends; return it."""
    if not isinstance(torch.export.export, Exports):
        install_generation_tagging_init()  # torch patches its modules once it compiles anything, which is no change
        torch.export.export = Exports(torch.export.export)
        first = capture.trace
        traces = Traces(first, torch.export.export)
        for name, module in list(sys.modules.items()):
            if name.startswith(("fxprune.", "tests.")) and getattr(module, "trace", None) is first:
                module.trace = traces
    return torch.export.export


def sizes_of(program: ExportedProgram) -> object:
    """What is known about the sizes of a program that vary: a graph that fixes one fixes it for the program."""
    modes = (node.meta["val"].fake_mode for node in program.graph.nodes if isinstance(node.meta.get("val"), FakeTensor))
    env = getattr(next(modes, None), "shape_env", None)
    if env is None:
        return ()
    counts = [len(found) for found in (env.guards, env.axioms, env.divisible, env.deferred_runtime_asserts)]
    return dict(env.replacements), dict(env.var_to_range), counts


def modes() -> tuple[object, ...]:
    """The settings of torch that tracing asks for."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        *(torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        *(torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )


def digest_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bytes, tuple[type | FunctionType, ...]] | None:
    """A digest of a module with its state and of what it is called with, and the classes and functions in them.

    None if something has no name that a pickle could write, or is code that lasts no longer than a test.
    """
    written = io.BytesIO()
    writer = _Writer(written)
    try:
        writer.dump((module, args, kwargs))
    except Exception:  # pickle, and objects asked for their state, refuse with whatever error they like
        return None
    bases = [base for found in writer.code.values() if isinstance(found, type) for base in found.__mro__]
    code = tuple({id(found): found for found in (*writer.code.values(), *bases) if found is not object}.values())
    lasting = all(str(found.__module__).partition(".")[0] in _LASTING for found in code)
    return (hashlib.sha256(written.getvalue()).digest(), code) if lasting else None


def namespaces(code: tuple[type | FunctionType, ...]) -> Iterator[tuple[object, Mapping[str, object]]]:
    """The attributes of classes, what can be called in their modules and in transformers', and registries in those."""
    for found in (*code, torch.Tensor):
        if isinstance(found, type):
            yield found, {name: value for name, value in vars(found).items() if name not in _WORKED_OUT}
    rooms = ("transformers.", "fxprune.trace.")
    helpers = [name for name in sys.modules if name.startswith(rooms) and ".models." not in name]
    for name in dict.fromkeys([*(str(found.__module__) for found in code), *_CALLED, *helpers]):
        names = dict(vars(sys.modules[name]))
        yield name, {key: value for key, value in names.items() if callable(value)}
        for key, value in names.items():
            if isinstance(value, Mapping) and key != "__builtins__":
                entries = {str(k): entry for k, entry in list(value.items())}
                yield (name, key), {k: entry for k, entry in entries.items() if callable(entry) or type(entry) is tuple}


def _with_constants_of_its_own(program: ExportedProgram) -> ExportedProgram:
    """A program whose constants nobody else can write to."""
    own = copy.copy(program)
    own._constants = {
        name: value.clone() if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else value
        for name, value in program.constants.items()
    }
    return own


class Traces:
    """``fxprune.trace`` with a memory, in which each graph has a copy of the weights that it was traced with."""

    def __init__(self, trace: Callable[..., Traced], exports: Exports) -> None:
        self.trace = trace
        self.made = self.found = 0
        self._exports = exports
        self._known: dict[object, tuple[Traced, object]] = {}
        functools.update_wrapper(self, trace)

    def __call__(self, model: Any, example_inputs: Any = None, **options: Any) -> Traced:
        """The trace of a model; of one that is the same where there was one."""
        exports = self._exports
        plain = torch.export.export is exports and not exports.fresh and _is_small(model)
        key = exports.key_of(model, (example_inputs,), options) if plain else None
        known, sizes = self._known.get(key, (None, None)) if key is not None else (None, None)
        if known is not None and sizes_of(known.graph_module) == sizes:
            self.found += 1
            return _bound(known, model, example_inputs)
        self.made += 1
        traced = self.trace(model, example_inputs, **options)
        if key is not None:
            kept = _bound(traced, None, None)
            self._known[key] = kept, sizes_of(kept.graph_module)
        return traced


def _is_small(model: object) -> bool:
    """Whether a model is quicker to read than to trace."""
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule) or "_parameters" not in vars(model):
        return False
    parameters = list(model.parameters())
    return not any(map(nn.parameter.is_lazy, parameters)) and sum(p.numel() for p in parameters) < _LARGEST


def _bound(traced: Traced, model: nn.Module | None, example_inputs: Any) -> Traced:
    """A copy of a trace that reads the weights of ``model``; copies of them where there is none."""
    dense = traced.graph_module
    facts = facts_of(dense).copy()
    names = facts[Source].names
    held = {
        name: value.detach().clone() if model is None or not names[name] else get_tensor(model, names[name][0])
        for name, value in weights(dense)
    }
    copied = fx.GraphModule(held, copy.deepcopy(dense.graph))
    copied.train(dense.training)
    owner = nn.Module() if model is None else model
    facts.put(Source(owner, names, example_inputs))
    set_facts(copied, facts)
    return Traced(copied, owner, traced.notes)


class _Writer(pickle.Pickler):
    """Writes modules with their state, fake tensors as shapes, other tensors with their values.

    Attributes:
        code: the classes and functions that it met.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.code: dict[int, type | FunctionType] = {}
        self._order: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        """A tensor: its shape and type, its values if it has any, and which of them it is, since some are tied.

        A class without a name that a pickle could write is known by its identity, and kept, so that no other has it.
        """
        if isinstance(obj, type) and "<locals>" in obj.__qualname__:
            self.code[id(obj)] = _LOCAL_CLASSES[id(obj)] = obj
            return "class", id(obj)
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
        if isinstance(obj, FakeTensor) or obj.is_meta:
            return told
        return *told, obj.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()

    def reducer_override(self, obj: Any) -> Any:
        """Modules and configs with all their state, but where they were read from; classes and functions are noted."""
        if isinstance(obj, type | FunctionType):
            self.code[id(obj)] = obj
        if isinstance(obj, nn.Module | PreTrainedConfig):  # what else their classes write may leave something out
            self.code[id(type(obj))] = type(obj)
            state = {name: value for name, value in vars(obj).items() if name not in _WHENCE}
            return object.__new__, (type(obj),), state
        return NotImplemented
