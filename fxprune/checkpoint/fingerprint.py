"""Fingerprint of a model: the outputs of one short forward pass, compared when it is saved and when it is loaded."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxprune.emit.emitted import outputs_agree
from fxprune.emit.layout import stock_class
from fxprune.emit.load import configs_of
from fxprune.errors import CheckpointError
from fxprune.graph.context import Refusal, attempt, default_modes, eval_mode, preserve_rng, quiet
from fxprune.graph.tensors import computed_tensors, set_tensor
from fxprune.masking.compare import ROUGH, TOLERANCE
from fxprune.masking.masked_run import output_tensors
from fxprune.offload.ranks import input_device
from fxprune.trace.inputs import hooks_left_out, without_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Forward", "check_loaded", "check_written", "run_forward"]

_SEED, _BATCH, _TOKENS = 0, 2, 6
_SIDE = 32
"""Pixels of a side of images whose size the config does not give."""
_MOST = 8
"""Rows, and numbers of each, that are recorded: enough to tell models apart, a screenful in the manifest."""

_LARGEST = 2**26
"""Numbers in recorded inputs: no image or text of a few tokens has more."""

Shapes = Mapping[str, Mapping[str, Any]]
"""Inputs by name: ``shape``, and for token ids ``below``, the size of the vocabulary."""


@dataclass(frozen=True)
class Forward:
    """One forward pass: the inputs that the model ran on, and its first output."""

    inputs: Shapes
    output: torch.Tensor

    def record(self, model: nn.Module) -> dict[str, Any]:
        """Values for a manifest: inputs, some of the output and its largest value, and the dtype of the weights."""
        scale, values = float(self.output.abs().nan_to_num().max()), _sample(self.output).tolist()
        return {"seed": _SEED, "inputs": self.inputs, "dtype": _dtype(model), "scale": scale, "values": values}


def run_forward(model: PreTrainedModel, inputs: Shapes | None = None) -> Forward | Refusal:
    """Run a copy of a model that shares its parameters and hooks, in evaluation mode, on a few random tokens.

    A model that cannot be copied, such as a sharded one, is run itself.

    Args:
        inputs: recorded ones; None for the first that the model accepts.
    """
    found: Forward | Refusal = Refusal(ValueError("inputs for it cannot be guessed"))
    for shapes in _candidates(model) if inputs is None else [inputs]:
        found = _run(model, shapes)
        if isinstance(found, Forward):
            break
    return found


def _candidates(model: PreTrainedModel) -> Iterator[Shapes]:
    if model.main_input_name == "input_ids":
        table = attempt(model.get_input_embeddings)
        rows = getattr(getattr(table, "weight", None), "shape", (0,))[0]
        tokens = {"shape": [_BATCH, _TOKENS], "below": rows}
        yield from ({"input_ids": tokens}, {"input_ids": tokens, "decoder_input_ids": tokens}) if rows else ()
    size, channels = getattr(model.config, "image_size", _SIDE), getattr(model.config, "num_channels", None)
    if model.main_input_name == "pixel_values" and type(channels) is int:
        sides = list(size) if isinstance(size, list | tuple) else [size, size]
        yield {"pixel_values": {"shape": [_BATCH, channels, *sides]}}


def _run(model: PreTrainedModel, shapes: Shapes) -> Forward | Refusal:
    generator, device = torch.Generator().manual_seed(_SEED), input_device(model)
    inputs: dict[str, torch.Tensor] = {}
    for name, entry in shapes.items():
        if "below" in entry:
            inputs[name] = torch.randint(entry["below"], entry["shape"], generator=generator).to(device)
        else:
            inputs[name] = torch.randn(entry["shape"], generator=generator).to(device, model.dtype)
    dispatched = any("_hf_hook" in vars(module) for module in model.modules())  # such hooks hold weights
    twin = None if dispatched else attempt(_twin, model)
    runs = twin if isinstance(twin, type(model)) else model
    options = without_cache(runs) if runs is twin else {}
    with default_modes(), preserve_rng(), eval_mode(runs), quiet(), torch.no_grad():
        torch.manual_seed(_SEED)
        found = attempt(partial(runs, **inputs, **options))
    outputs = () if isinstance(found, Refusal) else output_tensors(found)
    for output in filter(torch.numel, outputs[:1]):
        whole = output.full_tensor() if hasattr(output, "full_tensor") else output
        return Forward(shapes, whole)
    return found if isinstance(found, Refusal) else Refusal(ValueError("its outputs are no numbers"))


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copy of a model, which its forward may write to, with the same parameters and hooks."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters()}
    memo |= {id(tensor): tensor.detach().clone() for tensor in computed_tensors(model)}
    tables = (table for module in model.modules() for name, table in vars(module).items() if name.endswith("_hooks"))
    memo |= {id(hook): hook for table in tables for hook in table.values()}
    return copy.deepcopy(model, memo)


def _dtype(model: nn.Module) -> str:
    return str(next((p.dtype for p in model.parameters() if p.is_floating_point()), None))


def _sample(output: torch.Tensor) -> torch.Tensor:
    """Some rows of an output and some numbers of each, evenly spread, in float32 on the CPU."""
    rows = output.detach().reshape(-1, output.shape[-1] if output.dim() else 1)
    for axis in (0, 1):
        size = rows.shape[axis]
        index = torch.linspace(0, size - 1, min(size, _MOST), device=rows.device).long()
        rows = rows.index_select(axis, index)
    return rows.float().cpu()


def check_loaded(model: PreTrainedModel, record: Mapping[str, Any], where: str) -> None:
    """Compare the outputs of a loaded model with the record in its manifest, unless it was loaded in another dtype.

    Raises:
        CheckpointError: it does not run, or computes something else.
    """
    if "values" not in record or record["dtype"] != _dtype(model) or getattr(model, "hf_quantizer", None) is not None:
        return
    remedy = "Load it with the versions in its manifest, or save the model again"
    if sum(math.prod(entry["shape"]) for entry in record["inputs"].values()) > _LARGEST:
        raise CheckpointError("its manifest asks for a forward pass on larger inputs", where=where, remedy=remedy)
    found = run_forward(model, record["inputs"])
    if isinstance(found, Refusal):
        raise CheckpointError(f"the loaded model does not run: {found}", where=where, remedy=remedy) from found.error
    want, got = torch.tensor(record["values"]), _sample(found.output)
    half = found.output.dtype not in (torch.float32, torch.float64)
    error, accepted = float("inf"), ROUGH if half else TOLERANCE
    if want.shape == got.shape:
        rows = (want.nan_to_num() - got.nan_to_num()).abs().amax(dim=-1)
        # a router that rounds differently in half precision may send single tokens to other experts
        error = float(rows.median() if half else rows.max()) / max(1.0, record["scale"])
    if not error <= accepted:
        fault = f"the loaded model computes something else than the one that was saved: outputs differ by {error:.1e}"
        raise CheckpointError(fault, where=where, remedy=remedy)


def check_written(model: PreTrainedModel, own: Forward | Refusal, loaded: PreTrainedModel) -> dict[str, Any]:
    """Compare a model with the one that was loaded from its checkpoint; return the record for the manifest.

    The loaded one computes on the CPU, or with the parameters of ``model`` on the one other device that they are on.

    Args:
        own: the forward pass of ``model``.

    Raises:
        CheckpointError: they compute something else, or a module is of another class.
    """
    differences = list(_differences(model, loaded))
    if differences and differences[0].is_class:
        raise _changed(differences[0].text)
    devices = {parameter.device for parameter in model.parameters()}
    sharded = any(hasattr(parameter, "placements") for parameter in model.parameters())
    for theirs, ours in zip(configs_of(loaded), configs_of(model), strict=False):
        names = ("_attn_implementation_internal", "_experts_implementation_internal")
        vars(theirs).update({name: vars(ours)[name] for name in names if name in vars(ours)})
    if len(devices) == 1 and devices != {torch.device("cpu")} and not sharded:
        _move(loaded, model, *devices)
    again = run_forward(loaded, own.inputs if isinstance(own, Forward) else None)
    if isinstance(own, Refusal) and (sharded or isinstance(again, Refusal)):
        return {"note": f"not compared with the model: {own}"}
    fault = _fault(own, again)
    if fault:
        raise _changed("; ".join((fault, *(difference.text for difference in differences[:1]))))
    assert isinstance(again, Forward)
    return again.record(loaded)


def _move(loaded: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Move a loaded model to the device of another one, with the parameters of that one in place of a second copy."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        set_tensor(loaded, name, parameter)
    for name, buffer in list(loaded.named_buffers(remove_duplicate=False)):
        set_tensor(loaded, name, buffer.to(device))


def _fault(own: Forward | Refusal, again: Forward | Refusal) -> str:
    if isinstance(own, Refusal):
        return f"only the loaded one runs: {own}"
    if isinstance(again, Refusal):
        return f"the loaded one does not run: {again}"
    want, got = (found.output.cpu().nan_to_num() for found in (own, again))
    if want.shape != got.shape:
        return f"its outputs are {list(want.shape)}, those of the loaded one {list(got.shape)}"
    return "" if outputs_agree(want, got) else f"outputs differ by up to {float((want - got).abs().max()):.1e}"


def _changed(fault: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint would not be this model: {fault}",
        where="model",
        remedy="Undo what was changed beside weights and config; save_pretrained(verify=False) saves it without",
    )


@dataclass(frozen=True)
class _Difference:
    text: str
    is_class: bool = False


def _differences(model: nn.Module, loaded: nn.Module) -> Iterator[_Difference]:
    """Modules that differ from those which a loader builds: those of another class first."""
    there = dict(loaded.named_modules())
    pairs = [(path or "the model", module, there[path]) for path, module in model.named_modules() if path in there]
    for path, module, other in pairs:
        kinds = [(kind.__module__, kind.__qualname__) for kind in map(stock_class, (module, other))]
        if kinds[0] != kinds[1]:
            text = f"{path} is {type(module).__name__}, where a loader builds {type(other).__name__}"
            yield _Difference(text, is_class=True)
    for path, module, other in pairs:
        if "forward" in vars(module):
            yield _Difference(f"{path} has a forward of its own")
        elif module.extra_repr() != other.extra_repr():
            yield _Difference(f"{path} is ({module.extra_repr()}), where a loader builds ({other.extra_repr()})")
    yield from (_Difference(f"{path} has hooks") for path in hooks_left_out(model))
