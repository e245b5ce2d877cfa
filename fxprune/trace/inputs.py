"""Example inputs, copies ("twins") of a model to run them on, and the checks of both before tracing.

A twin has the model's parameters without storage, or over the same storage; its buffers and everything else that Python
code may write to are copies. Hooks that a user registered are left out.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.overrides import TorchFunctionMode

from fxprune.data.calibration import check_names
from fxprune.data.samples import DECODER
from fxprune.errors import ArgumentError, FxpruneError, TraceError, UnsupportedModelError
from fxprune.graph.compat import (
    SIZE,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    disable_modes,
    fake_like,
    fake_mode,
    storage_of,
    tree_leaves,
    tree_map,
)
from fxprune.graph.context import Refusal, attempt, disable_torch_function, quiet
from fxprune.graph.tensors import as_parameter, computed_tensors, map_tensors
from fxprune.offload.ranks import check_one_device, check_unsharded
from fxprune.pipeline.arguments import format_value, refuse
from fxprune.rules.registry import written_arguments

M = TypeVar("M", bound=nn.Module)

BATCH, TOKENS, DECODED = 2, 7, 5
"""``torch.export`` takes a size of 1 for a constant; widths and numbers of heads are hardly ever multiples of 7."""

_FRAMES = 16
"""Vectors that the convolutions over a sound end in."""


def is_hugging_face(model: nn.Module) -> bool:
    """Whether ``model`` is one of transformers' models."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def default_inputs(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword inputs to trace ``model`` with, in the order of its ``forward``, which becomes that of the graph.

    These are the ``given`` ones; if None, a Hugging Face model gets ``input_ids`` of shape (2, 7), and what else it
    needs to run: tokens for its decoder, and images or sounds of the sizes in its config.
    """
    if given is not None:
        order = {name: place for place, name in enumerate(forward_parameters(model))}
        return dict(sorted(given.items(), key=lambda item: order.get(item[0], len(order))))
    made = _made_inputs(model) if is_hugging_face(model) and isinstance(model.main_input_name, str) else {}
    if not made:
        raise TraceError(
            f"cannot make inputs for {type(model).__name__}",
            where="example_inputs",
            remedy="Pass example_inputs={'name': tensor, ...}, the keyword arguments of its forward",
        )
    return default_inputs(model, made)


def _made_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Zeros for the main input of a Hugging Face model, and for others until it runs; none if no size is known.

    A model that generates from tokens alone needs no other. The sizes of images and sounds are those of the config.
    """
    decodes = _decodes(model)
    named = [model.main_input_name, *([DECODER] if decodes else [])]
    made = {name: value for name in named if (value := _zeros(model.config, name)) is not None}
    if model.main_input_name not in made or (model.can_generate() and not decodes):
        return made if model.main_input_name in made else {}
    for name in ("input_ids", "pixel_values", "input_values", "input_features"):
        value = _zeros(model.config, name) if name in forward_parameters(model) and name not in made else None
        if value is not None and not _runs(model, made):
            made[name] = value
    return made


def inputs_like(model: nn.Module, data: Any) -> dict[str, torch.Tensor] | None:
    """Inputs like the first calibration sample, to trace a Hugging Face model with; None if the default ones do.

    The default ones are tokens, and images and sounds of the sizes in the config; a sample may have others, or further
    inputs. There are two of each unless the sample has images or sounds beside what the model needs to run: its code
    may then take samples one by one. Data that is not in memory is not read.
    """
    first = data[0] if isinstance(data, list | tuple) and data else data
    if not is_hugging_face(model) or not isinstance(first, Mapping):
        return None
    found = attempt(default_inputs, model, None, refusals=(FxpruneError,))
    made: Mapping[str, torch.Tensor] = {} if isinstance(found, Refusal) else found
    given = _first_row(model, first, made)
    beside = {name: value for name, value in given.items() if name not in made}
    floats = any(value.is_floating_point() for value in beside.values())
    told = [value for name, value in beside.items() if name not in _DERIVED]  # other integers than all zeros or ones
    others = any(bool((value != 0).any()) and bool((value != 1).any()) for value in told)
    known = [name for name in given if name in made and made[name].is_floating_point()]
    resized = any(given[name].shape[1:] != made[name].shape[1:] for name in known)
    if not floats and not others and not resized:
        return None
    if _decodes(model) and DECODER not in given:  # made from labels
        given[DECODER] = torch.zeros(1, DECODED, dtype=torch.long)
    if floats:
        return given
    ids = given.get("input_ids")
    if ids is not None:  # the graph leaves their number free, and padding is cut off
        given = {name: value for name, value in given.items() if name not in _DERIVED}
        given = {name: value[:, :TOKENS] if value.shape[:2] == ids.shape else value for name, value in given.items()}
    return {name: torch.cat([value] * BATCH) for name, value in given.items()}


_DERIVED = ("attention_mask", "position_ids")
"""Inputs that models make from the number of tokens where they are not given."""


def _first_row(model: Any, sample: Mapping[str, Any], made: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a sample that ``forward`` takes, without labels, as a batch of one; of a batch, its first row."""
    from transformers.utils.generic import find_labels

    named = [name for name in forward_parameters(model) if name not in ("labels", *find_labels(type(model)))]
    read = {name: attempt(torch.as_tensor, sample[name]) for name in named if name in sample}
    given = {name: value for name, value in read.items() if isinstance(value, torch.Tensor) and value.dim()}
    main = model.main_input_name  # a name, or several
    known = next((name for name in (*made, *([main] if isinstance(main, str) else main)) if name in given), None)
    if known is None:
        return given
    batch = {name: value[None] for name, value in given.items()}
    if given[known].dim() < made[known].dim() if known in made else not _runs(model, given) and _runs(model, batch):
        return batch
    rows = len(given[known])
    return {name: value[:1] if len(value) == rows else value for name, value in given.items()}


def _decodes(model: Any) -> bool:
    """Whether a model reads the tokens of a decoder beside its main input."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and DECODER in forward_parameters(model)


def _runs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> bool:
    twin = meta_twin(model).eval()
    given = {name: value.to("meta") for name, value in inputs.items()}
    with torch.no_grad(), quiet():
        return not isinstance(attempt(partial(twin, **given)), Refusal)


def _zeros(config: Any, name: str) -> torch.Tensor | None:
    """Zeros for the input ``name``, of the sizes that a config or a part of it states; None if it states none."""
    if name in ("input_ids", DECODER):  # of two lengths, as those of source and target are
        return torch.zeros(BATCH, TOKENS if name == "input_ids" else DECODED, dtype=torch.long)
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))]

    def stated(field: str) -> Any:
        return next((getattr(part, field) for part in parts if getattr(part, field, None) is not None), None)

    shape: tuple[Any, ...] = ()
    if name == "pixel_values":
        sides = stated("image_size")
        shape = (stated("num_channels"), *((sides, sides) if isinstance(sides, int) else tuple(sides or ())))
    elif name == "input_values":
        shape = (math.prod(stated("conv_stride") or (0,)) * _FRAMES,)
    elif name == "input_features":
        shape = (stated("num_mel_bins"), 2 * (stated("max_source_positions") or 0))
    known = all(isinstance(size, int) and size > 0 for size in shape) and shape
    return torch.zeros(BATCH, *shape) if known and (name != "pixel_values" or len(shape) == 3) else None


def shifted_right(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """The tokens that the decoder of an encoder-decoder reads to predict ``labels`` ``(samples, tokens)``."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if callable(own):
        return own(labels)  # type: ignore[no-any-return]
    config = model.config
    start = next((i for i in (config.decoder_start_token_id, config.pad_token_id) if i is not None), 0)
    moved = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return moved.masked_fill(moved < 0, config.pad_token_id or 0)


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Named parameters of ``forward``; where it passes ``**kwargs`` on, also those of the ones it overrides."""
    found: dict[str, inspect.Parameter] = {}
    overridden = (vars(kind)["forward"].__get__(model) for kind in type(model).__mro__ if "forward" in vars(kind))
    for forward in (model.forward, *overridden):
        parameters = inspect.signature(forward).parameters
        named = {name: one for name, one in parameters.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
        found = {**found, **named, **found}
        if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            break
    return found


def name_arguments(twin: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Give the ``forward`` of a copy a signature that names all ``inputs``: ``torch.export`` fixes sizes in others."""
    forward, own = twin.forward, inspect.signature(twin.forward).parameters
    if not own.keys() >= inputs.keys():
        named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
        twin.forward = lambda **given: forward(**given)
        twin.forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]


def free_axes(value: torch.Tensor) -> int:
    """Number of leading axes of an input, batch and sequence, that may vary if the model allows it.

    Integers are tokens ``(batch, sequence)``; floats of three axes are ``(batch, sequence, width)``, others
    ``(batch, ...)``.
    """
    return min(value.dim(), 2 if not value.is_floating_point() or value.dim() == 3 else 1)


def dynamic_dims(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The axes of each tensor that may vary, in the structure of ``inputs``, as ``torch.export`` takes them."""
    auto = torch.export.Dim.AUTO

    def free(value: Any) -> dict[int, Any] | None:
        return dict.fromkeys(range(free_axes(value)), auto) if isinstance(value, torch.Tensor) else None

    return {name: tree_map(free, value) for name, value in inputs.items()}


def deciding_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Inputs of a Hugging Face model whose values may decide its graph: integers and flags other than tokens.

    Python code reads such values, as in ``for t, h, w in grid.tolist()``, and a trace has none. They therefore stay
    plain tensors: what is computed from them alone is computed at once, and is a constant of the graph.
    """
    main = getattr(model, "main_input_name", None)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    whole = {name: value for name, value in tensors.items() if not (value.is_floating_point() or value.is_complex())}
    return {name: value.cpu() for name, value in whole.items() if main is not None and name not in (main, DECODER)}


def keep_values(twin: nn.Module, known: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Make the ``forward`` of a copy read ``known`` in place of the inputs of these names.

    What is cast to ``dtype``, that of the weights while they are traced, is part of the graph.
    """
    forward, signature = twin.forward, inspect.signature(twin.forward)

    def with_values(**given: Any) -> Any:
        with _Computed(dtype):
            return forward(**{**given, **known})

    with_values.__signature__ = signature  # type: ignore[attr-defined]
    twin.forward = with_values


_MAKERS = (torch.arange, torch.tensor)


class _Computed(TorchFunctionMode):
    """Computes what depends on plain tensors alone, outside of a trace."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        known = func in _MAKERS or bool(tensors)
        if known and not any(isinstance(leaf, FakeTensor | nn.Parameter | SIZE) for leaf in leaves):
            with disable_modes(), disable_torch_function():
                made = func(*args, **(kwargs or {}))
            if not any(isinstance(leaf, torch.Tensor) and leaf.dtype == self.dtype for leaf in tree_leaves(made)):
                return made
        return func(*args, **(kwargs or {}))


def blank(value: Any, native: torch.dtype, dtype: torch.dtype) -> Any:
    """Zeros like a tensor, on the current default device, with ``dtype`` for ``native``; any other value as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros(value.shape, dtype=dtype if value.dtype == native else value.dtype)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def meta_twin(model: M) -> M:
    """A copy of ``model`` on ``meta``."""
    return _twin(model, lambda tensor: as_parameter(torch.empty_like(tensor, device="meta"), tensor))


def fake_twin(model: nn.Module, mode: FakeTensorMode | None, native: torch.dtype, dtype: torch.dtype) -> nn.Module:
    """A copy to trace, in evaluation mode, with fake tensors; parameters in ``native`` get ``dtype``.

    ``mode`` makes the tensors, without storage and on the CPU; None makes them on ``meta``, which runs faster.
    """

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if isinstance(tensor, nn.Parameter) and tensor.dtype == native else tensor.dtype
        if mode is not None:
            return fake_like(tensor, mode, wanted)
        return as_parameter(torch.empty(tensor.shape, dtype=wanted, device="meta"), tensor)

    return _prepare(_twin(model, empty))


def alias_twin(model: M, written: Container[str] = ()) -> M:
    """A copy to run, in evaluation mode, whose parameters share the memory of the model's.

    They require gradients, which the model's own parameters do not receive. Buffers, which code may write to, are
    copied, and so are parameters named in ``written``, from :func:`written_parameters` or :func:`private_parameters`.
    """
    copied = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in written}

    def alias(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor.detach().clone()
        value = tensor.detach().clone() if id(tensor) in copied else tensor.detach()
        return nn.Parameter(value, requires_grad=not tensor.is_inference() and value.is_floating_point())

    return _prepare(_twin(model, alias))


def written_parameters(model: nn.Module, inputs: Mapping[str, Any]) -> frozenset[str]:
    """Names of the parameters that ``forward`` writes to, found without storage; all of them if it does not run so.

    Code that branches on values may do so on ``meta``, where there are none, and not on fake tensors, which stand for a
    trace: as of transformers 5 the masks of most models do.
    """
    mode = fake_mode(fixed=True)
    faked = partial(fake_twin, mode=mode, native=torch.float32, dtype=torch.float32)
    for make, device, context in ((meta_twin, "meta", nullcontext()), (faked, "cpu", mode)):
        twin = make(model).eval()
        twins = {storage_of(parameter): name for name, parameter in twin.named_parameters()}
        empty = partial(torch.empty_like, device=device)
        with context, torch.no_grad(), quiet():
            given = {name: map_tensors(value, empty) for name, value in inputs.items()}
            with _Writes() as writes:
                ran = attempt(twin, **(without_cache(twin) | given))
        if not isinstance(ran, Refusal):
            return frozenset(name for storage, name in twins.items() if storage in writes.storages)
    return frozenset(name for name, _ in model.named_parameters())


_FEW = 1 << 24
"""Bytes of the parameters of a model up to which copying them takes less time than finding out which are written to."""


def private_parameters(model: nn.Module, inputs: Mapping[str, Any]) -> frozenset[str]:
    """Names of the parameters that a copy to run needs for itself: all of few, of many those that are written to."""
    if sum(parameter.nbytes for parameter in model.parameters()) <= _FEW:
        return frozenset(name for name, _ in model.named_parameters())
    return written_parameters(model, inputs)


def private_twin(model: M, inputs: Mapping[str, Any]) -> M:
    """A copy to run on ``inputs``, as from :func:`alias_twin`, that leaves the model as it is whatever it writes to."""
    return alias_twin(model, private_parameters(model, inputs))


class _Writes(TorchDispatchMode):
    """Records the storages that ops write to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            leaves = tree_leaves(written_arguments(func, args, kwargs or {}))
            self.storages |= {storage_of(x) for x in leaves if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def without_cache(model: Any) -> dict[str, bool]:
    """Disable the cache of ``model``, a copy; return the arguments of ``forward`` that are needed for it.

    The argument is passed only if ``forward`` names it: a class without a cache may not pass it on.
    """
    if not is_hugging_face(model):
        return {}
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return {"use_cache": False} if "use_cache" in forward_parameters(model) else {}


def hooks_left_out(model: nn.Module) -> tuple[str, ...]:
    """The paths of the modules with hooks that copies lack: those that torch did not register."""
    return tuple(dict.fromkeys(path or "the model" for path, _, _ in _hooks(model, _is_foreign)))


def _twin(model: M, make: Callable[[torch.Tensor], torch.Tensor]) -> M:
    memo: dict[int, Any] = {id(tensor): make(tensor) for tensor in (*model.parameters(), *model.buffers())}
    memo |= {id(tensor): tensor.detach().clone() for tensor in computed_tensors(model)}
    for module in model.modules():  # a module has a dozen tables, most of them empty, which are slow to copy
        memo |= {id(held): type(held)() for held in vars(module).values() if type(held) in _TABLES and not held}
    for _, table, key in _hooks(model, _is_foreign):
        memo[id(table[key])] = None  # a user's hook may hold objects that cannot be copied
    twin = copy.deepcopy(model, memo)
    for _, table, key in _hooks(twin, lambda hook: hook is None):
        del table[key]
    return twin


_TABLES = (dict, OrderedDict, set)


def _prepare(twin: M) -> M:
    """Set a copy to evaluation mode, and its attention and experts to variants that trace to plain ATen ops."""
    if is_hugging_face(twin):
        model: Any = twin
        parts: list[Any] = [part for part in twin.modules() if is_hugging_face(part)]
        if any(part.config._attn_implementation not in ("sdpa", "eager") for part in parts):
            model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
        if getattr(model.config, "_experts_implementation", None) is not None:
            # with values, the plain ops would copy the large matrix of an expert for each token
            real = (tensor for tensor in twin.parameters() if not isinstance(tensor, FakeTensor) and not tensor.is_meta)
            if not any(tensor.dim() == 3 and tensor[0].nbytes >= _LARGE for tensor in real):
                model.config._experts_implementation = "batched_mm"
    return twin.eval()


_LARGE = 1 << 18
"""Bytes of an expert's matrix from which on a copy of it for each token is not for a run with values."""


def _hooks(model: nn.Module, wanted: Callable[[Any], bool]) -> Iterator[tuple[str, dict[int, Any], int]]:
    """Yield the module path, the table and the key of each hook that is ``wanted``."""
    for path, module in model.named_modules():
        for name in _HOOKS:
            table = getattr(module, name)
            for key in [key for key, hook in table.items() if wanted(hook)]:
                yield path, table, key


_CAPTURING = "transformers.utils.output_capturing"
"""The module of hooks by which a model reads the outputs of its parts; it marks itself as having them."""


def _is_foreign(hook: Any) -> bool:
    """Whether ``hook`` is a user's: of neither torch, nor transformers' models, nor the model (``part_of_model``)."""
    module = str(getattr(hook, "__module__", None) or type(hook).__module__)
    return not getattr(hook, "part_of_model", False) and module != _CAPTURING and module.partition(".")[0] != "torch"


_MARKS = ("is_quantized", "hf_quantizer", "quantization_method", "quantization_config", "_is_quantized")
"""Attributes that transformers sets on a model, or on its config, when it loads quantised weights."""

_DEQUANTISE = "Load it in float32, bfloat16 or float16, or call model.dequantize() first"


def check_model(model: Any) -> None:
    """Check that ``model`` can be pruned: a Python module with plain weights, in one piece and on one device."""
    if not isinstance(model, nn.Module):
        wanted = "an instance of torch.nn.Module, such as a model of transformers"
        if any(hasattr(model, name) for name in ("graph_module", "model")):
            wanted = "its .model, or the module it was made from"
        raise refuse("model", model, wanted, UnsupportedModelError)
    if "_parameters" not in vars(model) and not isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "it was never initialised", where=type(model).__name__, remedy="Call super().__init__() in its __init__"
        )
    for path, module in model.named_modules():
        what, remedy = _fault_of(module)
        if what:
            raise UnsupportedModelError(what, where=path or type(model).__name__, remedy=remedy)
    check_merged(model)
    _check_weights(model)


def _check_weights(model: nn.Module) -> None:
    named = list(model.named_parameters())
    if not named:
        raise UnsupportedModelError("it has no parameters", where=type(model).__name__, remedy="Pass one with weights")
    check_unsharded(model)
    marked = is_marked_quantised(model)
    for name, parameter in named if marked else ():
        if type(parameter) is not nn.Parameter:
            what = f"a {type(parameter).__name__} is a quantised weight"
            raise UnsupportedModelError(what, where=name, remedy=_DEQUANTISE)
    for name, buffer in model.named_buffers() if marked else ():
        if buffer.dim() >= 2 and not buffer.dtype.is_floating_point and buffer.dtype != torch.bool:
            what = f"{buffer.dtype} of shape {tuple(buffer.shape)} in a model marked as quantised holds packed weights"
            raise UnsupportedModelError(what, where=name, remedy=_DEQUANTISE)
    for name, parameter in named:
        own = model.get_submodule(name.rpartition(".")[0])._parameters.values()
        _check_parameter(name, parameter, any(one is not None and one is not parameter for one in own))
    check_one_device(model)


def check_merged(model: Any) -> None:
    """Refuse a model with adapters of PEFT: around it, or in its modules."""
    modules = model.modules() if isinstance(model, nn.Module) and "_modules" in vars(model) else ()
    wrapped = hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")
    if wrapped or any("base_layer" in part._modules and hasattr(part, "unmerge") for part in modules):
        raise UnsupportedModelError(
            "it has adapters beside its weights",
            where=type(model).__name__,
            remedy="Call merge_and_unload() first, and pass the model that it returns",
        )


def _fault_of(module: nn.Module) -> tuple[str, str]:
    """The reason why a module cannot be pruned, and the remedy; empty if it can be."""
    packed = [name for name, value in vars(module).items() if isinstance(value, torch.ScriptObject)]
    if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        return "torch.nn.utils.prune masks a weight of it", "Call torch.nn.utils.prune.remove on it first"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript", "Pass the original Python module"
    if "_orig_mod" in module._modules:
        return "it is compiled", "Pass its ._orig_mod, and compile the pruned model"
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "it is wrapped for several devices", "Pass its .module"
    return (f"its {packed[0]} holds packed weights", _DEQUANTISE) if packed else ("", "")


def _check_parameter(name: str, parameter: torch.Tensor, beside: bool) -> None:
    """Check one parameter; ``beside`` tells whether its module has others."""
    what = ""
    if nn.parameter.is_lazy(parameter):
        what, remedy = "it is lazy and has no shape yet", "Run the model once, on any input"
    elif parameter.is_complex():
        what, remedy = f"its dtype is {parameter.dtype}", "Keep real and imaginary parts as two parameters"
    elif not parameter.dtype.is_floating_point or parameter.element_size() < 2:
        what, remedy = f"dtype {parameter.dtype} is a quantised format", "Dequantise the model first"
    elif parameter.layout != torch.strided or parameter.is_nested:
        what = f"its layout is {'nested' if parameter.is_nested else parameter.layout}"
        remedy = "Convert it to a dense tensor first, as with weight.to_dense()"
    elif 0 in parameter.shape[:1] and (parameter.dim() == 1 or beside):  # shards are cut along the first axis
        what = f"it is empty, of shape {tuple(parameter.shape)}"
        remedy = "Remove it from the model, or gather the weights if they are sharded over processes"
    if what:
        raise UnsupportedModelError(what, where=name, remedy=remedy)


def check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Check that ``forward`` takes these keyword inputs, and that a graph can."""
    check_names(inputs)
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        raise UnsupportedModelError(
            "it has no forward", where=type(model).__name__, remedy="Pass a module that can be called"
        )
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**inputs)
    except TypeError as error:
        first = next(iter(signature.parameters.values()), None)
        unnamed = first is not None and first.kind in (first.POSITIONAL_ONLY, first.VAR_POSITIONAL)
        wrapped = "Pass a module that calls this one, and whose forward takes each input by a name"
        raise ArgumentError(
            f"{type(model).__name__} takes {signature}: {error}",
            where="example_inputs",
            remedy=wrapped if unnamed else "Pass the arguments of forward by name",
        ) from error
    check_names(inputs, on_meta=any(parameter.is_meta for parameter in model.parameters()))


def check_values(model: nn.Module) -> None:
    """Check that weights are finite: otherwise scores mean nothing, and outputs cannot be compared."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        value = parameter.detach()
        # the sum needs no memory and is finite only if every term is; if it overflows, look at each
        if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):
            raise UnsupportedModelError(
                "it holds values that are NaN or infinite", where=name, remedy="Load the weights again, or repair them"
            )


def check_runs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Check that a copy of the model runs on its keyword inputs."""
    twin = private_twin(model, inputs)
    with quiet(), torch.no_grad():
        found = attempt(twin, **dict(inputs))
    if isinstance(found, Refusal):
        raise ArgumentError(
            f"{type(model).__name__} does not run on them: {found}",
            where="example_inputs",
            remedy="Pass inputs on which model(**example_inputs) runs",
        ) from found.error


def check_copies(model: nn.Module) -> None:
    """Check that Python can copy a model, since a graph is traced from a copy."""
    parts = (*model.modules(), *model.parameters(), *model.buffers(), *computed_tensors(model))
    memo = {id(part): part for part in parts}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            refused = None if name.endswith("_hooks") else _refused_copy(value, memo)
            if refused is not None:
                raise UnsupportedModelError(
                    f"{format_value(value)} that cannot be copied: {refused}",
                    where=f"{path}.{name}" if path else name,
                    remedy="Remove the attribute while the model is pruned, or define __deepcopy__ on it",
                )
    for path, module in model.named_modules():
        refused = _refused_copy(module, {key: part for key, part in memo.items() if part is not module})
        if refused is not None:
            what = f"a {type(module).__name__} that cannot be copied: {refused}"
            remedy = "Correct its __deepcopy__ or __getstate__"
            raise UnsupportedModelError(what, where=path or "model", remedy=remedy)


def _refused_copy(value: Any, memo: Mapping[int, Any]) -> Refusal | None:
    found = attempt(copy.deepcopy, value, dict(memo), refusals=(FxpruneError,))
    return found if isinstance(found, Refusal) else None


def is_marked_quantised(model: nn.Module) -> bool:
    """Whether a loader marked ``model`` as quantised; its weights may have been converted to floats since."""
    return bool(getattr(model, "is_quantized", False)) or getattr(model, "hf_quantizer", None) is not None


def clear_quantisation_marks(model: nn.Module) -> None:
    """Remove the marks of quantisation from ``model`` and its config, so that transformers saves and trains it."""
    for name in _MARKS:
        vars(model).pop(name, None)
        vars(getattr(model, "config", model)).pop(name, None)


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most parameters have, by number of elements."""
    count = Counter[torch.dtype]()
    for parameter in model.parameters():
        count[parameter.dtype] += parameter.numel()
    return count.most_common(1)[0][0]
