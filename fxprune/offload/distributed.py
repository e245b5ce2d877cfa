"""Models spread over processes or devices: made whole to be pruned, and the slim model spread in the same way.

Covered are FSDP2 and the tensor parallel styles of torch, whose weights are DTensors, and the ``device_map`` of
accelerate with its offloading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fxprune.errors import UnsupportedModelError
from fxprune.offload.ranks import hooks_of_accelerate, is_sharded

M = TypeVar("M", bound=nn.Module)


def is_distributed(model: nn.Module) -> bool:
    """Whether weights are sharded over processes (DTensors), or a ``device_map`` spreads them or offloads some."""
    if "_modules" not in vars(model):  # its __init__ called no other
        return False
    places = {parameter.device for parameter in model.parameters()}
    dispatched = len(places) > 1 or any(place.type == "meta" for place in places)
    return is_sharded(model) or (dispatched and any(hooks_of_accelerate(model.modules())))


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the weights of a model, and gathers those of a module when it runs."""
    return any(_plain_class(module) is not type(module) for module in model.modules())


def sharding_plan(model: nn.Module) -> dict[str, str]:
    """The modules that FSDP2 shards one by one, those of the outer lists, as an ``fsdp_plan`` of transformers."""
    found: dict[str, str] = {}
    outer: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{other}.") for other in outer):
            outer.append(path)
            found[f"{re.sub(r'[.][0-9]+[.]', '.*.', path)}.*"] = "free_full_weight"
    return found


def reshard(model: nn.Module) -> None:
    """Free the whole weights that FSDP2 keeps after a forward run, so that parameters are shards again."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if _plain_class(module) is not type(module):
            module.reshard()


def tensor_parallel_size(model: nn.Module) -> int:
    """The number of processes that share the products of layers, of torch's tensor parallelism; else 1."""
    meshes = _meshes(model)
    return 1 if is_fully_sharded(model) or not meshes else int(meshes[0].size())


def whole_copy(model: M) -> M:
    """A copy of a distributed model with whole weights: on the device of its shards, or on the CPU.

    It shares all that is not distributed, such as the config. The weights are gathered, so that all processes must call
    it.

    Raises:
        UnsupportedModelError: the model is sharded in two ways at once, or by transformers' tensor parallelism, so that
            the slim model could not be sharded alike.
    """
    sharded = is_sharded(model)
    remedy = "Prune the folder it was loaded from, with offload='work', and shard the slim model"
    for path, module in model.named_modules():
        if sharded and _distributes(vars(module).get("forward")):
            what = "its forward was replaced by transformers' tensor parallelism"
            raise UnsupportedModelError(what, where=path or type(model).__name__, remedy=remedy)
    if len(set(map(str, _meshes(model)))) > 1:
        what = "its weights are sharded over several meshes"
        raise UnsupportedModelError(what, where=type(model).__name__, remedy=remedy)
    whole: Any = _copy(model, {}, dispatched=not sharded)
    if not sharded and hasattr(whole, "tie_weights"):
        whole.tie_weights()
    return whole  # type: ignore[no-any-return]


def distribute_like(slim: Any, dense: Any) -> None:
    """Distribute a slim model, in place, like the dense one that it was made from; modules are found by path.

    Weights that a ``device_map`` keeps on disk are kept in host memory.
    """
    if not is_sharded(dense):
        if hasattr(dense, "hf_device_map"):  # else hooks offload it as a whole: the slim model stays in host memory
            from accelerate import dispatch_model

            found = {name for name, _ in slim.named_modules()}
            places = {path: place for path, place in dense.hf_device_map.items() if path in found}
            dispatch_model(slim, device_map={path: "cpu" if p == "disk" else p for path, p in places.items()})
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    modules = dict(dense.named_modules())
    pairs = [(module, modules[path]) for path, module in slim.named_modules() if path in modules]
    if not any(isinstance(like, FSDPModule) for _, like in pairs):
        for module, like in pairs:
            _shard_parameters(module, like)
    for module, like in reversed(pairs):  # those inside first
        if isinstance(like, FSDPModule):
            fully_shard(module, **_fsdp_arguments(like))


def _copy(module: Any, memo: dict[int, Any], *, dispatched: bool) -> Any:
    """A copy of a module and of those in it, of the classes that they had before they were distributed."""
    if id(module) in memo:
        return memo[id(module)]
    kind = _plain_class(module)
    new = memo[id(module)] = kind.__new__(kind)
    own = {name: value for name, value in vars(module).items() if not str(name).startswith("__composable_api")}
    if "_hf_hook" in own or "hf_device_map" in own:
        set_by_accelerate = ("_hf_hook", "_old_forward", "hf_device_map", "forward", "to", "cuda")
        own = {name: value for name, value in own.items() if name not in set_by_accelerate}
    for table in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
        kept = [(key, hook) for key, hook in own[table].items() if not _distributes(hook)]
        own[table] = type(own[table])(kept)
    for table in ("_parameters", "_buffers"):
        for name, value in own[table].items():
            if value is not None and id(value) not in memo:  # a tied tensor is gathered once
                memo[id(value)] = _whole(module, name, value, dispatched)
        own[table] = {name: memo.get(id(value)) for name, value in own[table].items()}
    vars(new).update(own)
    vars(new)["_modules"] = {
        name: None if part is None else _copy(part, memo, dispatched=dispatched)
        for name, part in module._modules.items()
    }
    return new


def _meshes(module: nn.Module) -> list[Any]:
    """The device mesh of each sharded parameter."""
    parameters: list[Any] = list(module.parameters())
    return [value.device_mesh for value in parameters if hasattr(value, "placements")]


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before FSDP2 put one of its own above it."""
    first, *others = type(module).__bases__
    return others[0] if first.__name__ == "FSDPModule" else type(module)


def _whole(module: nn.Module, name: str, value: Any, dispatched: bool) -> torch.Tensor:
    whole: torch.Tensor = value.detach()
    if hasattr(value, "full_tensor"):
        whole = whole.full_tensor()  # type: ignore[attr-defined]
    elif whole.is_meta:
        maps = (getattr(hook, "weights_map", None) for hook in hooks_of_accelerate([module]))
        whole = next((found[name].detach() for found in maps if found is not None and name in found), whole)
    whole = whole.cpu() if dispatched and not whole.is_meta else whole
    return nn.Parameter(whole, value.requires_grad) if isinstance(value, nn.Parameter) else whole


def _distributes(function: Any) -> bool:
    """Whether a hook, or a forward, is one that gathers, moves or scatters the values around a distributed module."""
    place = str(getattr(function, "__module__", None) or type(function).__module__)
    return place.startswith(("torch.distributed.", "transformers.distributed.", "transformers.integrations.tensor_p"))


def _shard_parameters(module: nn.Module, like: nn.Module) -> None:
    """Shard the parameters of a module by torch's tensor parallelism, with its hooks."""
    from torch.distributed.tensor import distribute_tensor

    sharded: dict[str, Any] = like._parameters
    for name, parameter in sharded.items():
        if hasattr(parameter, "placements"):
            value: Any = module._parameters[name]
            part = distribute_tensor(value.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part, value.requires_grad))
    for hook in filter(_distributes, like._forward_pre_hooks.values()):
        module.register_forward_pre_hook(hook)
    for hook in filter(_distributes, like._forward_hooks.values()):
        module.register_forward_hook(hook)


def _fsdp_arguments(module: Any) -> Mapping[str, Any]:
    """Arguments of ``fully_shard`` for a module like one that it was called with."""
    state = module._get_fsdp_state()
    group = state._fsdp_param_group
    arguments: dict[str, Any] = {"mesh": _meshes(module)[0], "mp_policy": state._mp_policy}
    if group is not None:
        arguments["offload_policy"] = group.offload_policy
        if not state._auto_reshard_after_forward:
            arguments["reshard_after_forward"] = group.post_forward_mesh_info is not None
    return arguments
