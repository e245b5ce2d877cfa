"""The manifest ``fxprune.json``: dense model, versions, digests; and the fingerprint, outputs compared at load."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from fxprune.emit.emitted import outputs_agree
from fxprune.emit.layout import stock_class
from fxprune.emit.snapshot import configs_of
from fxprune.errors import CheckpointError, TraceError
from fxprune.graph.context import Refusal, attempt, default_modes, eval_mode, preserve_rng, quiet
from fxprune.graph.tensors import as_parameter, copy_with_hooks, set_tensor
from fxprune.masking.compare import ROUGH, TOLERANCE
from fxprune.masking.masked_run import output_tensors
from fxprune.offload.ranks import input_device, is_sharded
from fxprune.pipeline.arguments import MANIFEST as MANIFEST
from fxprune.removal.plan import Plan
from fxprune.report.report import Report, package_versions
from fxprune.trace.inputs import default_inputs, hooks_left_out, private_parameters, without_cache

T = TypeVar("T")

_SEED, _BATCH, _TOKENS = 0, 2, 6

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

    Parameters that it writes to are copied, so that the model itself stays as it is.

    A model that cannot be copied, such as a sharded one, is run itself. ``inputs`` are recorded ones; None for the
    first that the model accepts.
    """
    refusal, device = Refusal(ValueError("inputs for it cannot be guessed")), input_device(model)
    dispatched = any("_hf_hook" in vars(module) for module in model.modules())  # such hooks hold weights
    for shapes in _candidates(model) if inputs is None else [inputs]:
        generator = torch.Generator().manual_seed(_SEED)
        given: dict[str, torch.Tensor] = {}
        for name, entry in shapes.items():
            if "below" in entry:
                given[name] = torch.randint(entry["below"], entry["shape"], generator=generator).to(device)
            else:
                given[name] = torch.randn(entry["shape"], generator=generator).to(device, model.dtype)
        written = frozenset[str]() if dispatched or is_sharded(model) else private_parameters(model, given)
        parameters = {
            id(tensor): as_parameter(tensor.detach().clone(), tensor) if name in written else tensor
            for name, tensor in model.named_parameters()
        }
        twin = None if dispatched else attempt(copy_with_hooks, model, parameters)
        runs = twin if isinstance(twin, type(model)) else model
        options = without_cache(runs) if runs is twin else {}
        with default_modes(), preserve_rng(), eval_mode(runs), quiet(), torch.no_grad():
            torch.manual_seed(_SEED)
            found = attempt(partial(runs, **given, **options))
        outputs = () if isinstance(found, Refusal) else output_tensors(found)
        if outputs and outputs[0].numel():
            return Forward(shapes, outputs[0].full_tensor() if hasattr(outputs[0], "full_tensor") else outputs[0])
        refusal = found if isinstance(found, Refusal) else Refusal(ValueError("its outputs are not numbers"))
    return refusal


def _candidates(model: PreTrainedModel) -> Iterator[Shapes]:
    if model.main_input_name == "input_ids":
        table = attempt(model.get_input_embeddings)
        rows = getattr(getattr(table, "weight", None), "shape", (0,))[0]
        tokens = {"shape": [_BATCH, _TOKENS], "below": rows}
        yield from ({"input_ids": tokens}, {"input_ids": tokens, "decoder_input_ids": tokens}) if rows else ()
    size, channels = getattr(model.config, "image_size", 32), getattr(model.config, "num_channels", None)
    if model.main_input_name == "pixel_values" and type(channels) is int:
        sides = list(size) if isinstance(size, list | tuple) else [size, size]
        yield {"pixel_values": {"shape": [_BATCH, channels, *sides]}}
    made = attempt(default_inputs, model, None, refusals=(TraceError,))
    if not isinstance(made, Refusal):
        rows = getattr(model.config.get_text_config(), "vocab_size", None) or 2
        below = {name: {} if value.is_floating_point() else {"below": rows} for name, value in made.items()}
        yield {name: {"shape": list(value.shape), **below[name]} for name, value in made.items()}


def _dtype(model: nn.Module) -> str:
    return str(next((p.dtype for p in model.parameters() if p.is_floating_point()), None))


def _sample(output: torch.Tensor) -> torch.Tensor:
    """Eight rows of an output and eight numbers of each, evenly spread, in float32 on the CPU.

    That is enough to tell models apart, and a screenful in the manifest.
    """
    rows = output.detach().reshape(-1, output.shape[-1] if output.dim() else 1)
    for axis in (0, 1):
        size = rows.shape[axis]
        index = torch.linspace(0, size - 1, min(size, 8), device=rows.device).long()
        rows = rows.index_select(axis, index)
    return rows.float().cpu()


def check_loaded(model: PreTrainedModel, record: Mapping[str, Any], where: str) -> None:
    """Refuse a loaded model that computes something else than its manifest says, unless it is in another dtype."""
    if "values" not in record or record["dtype"] != _dtype(model) or getattr(model, "hf_quantizer", None) is not None:
        return
    remedy = "Load it with the versions in its manifest, or save the model again"
    # no image or text of a few tokens has more numbers
    if sum(math.prod(entry["shape"]) for entry in record["inputs"].values()) > 2**26:
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
    """Compare a model, whose forward pass is ``own``, with the one loaded from its checkpoint; return the record.

    The loaded one computes on the CPU, or with the parameters of ``model`` on the one other device that they are on.

    Raises:
        CheckpointError: they compute something else, or a module is of another class.
    """
    difference, is_class = next(_differences(model, loaded), ("", False))
    if is_class:
        raise _changed(difference)
    devices, sharded = {parameter.device for parameter in model.parameters()}, is_sharded(model)
    for theirs, ours in zip(configs_of(loaded), configs_of(model), strict=False):
        names = ("_attn_implementation_internal", "_experts_implementation_internal")
        vars(theirs).update({name: vars(ours)[name] for name in names if name in vars(ours)})
    if len(devices) == 1 and devices != {torch.device("cpu")} and not sharded:
        _move(loaded, model, *devices)
    again = run_forward(loaded, own.inputs if isinstance(own, Forward) else None)
    if isinstance(own, Refusal):
        if sharded or isinstance(again, Refusal):
            return {"note": f"not compared with the model: {own}"}
        fault = f"only the loaded one runs: {own}"
    elif isinstance(again, Refusal):
        fault = f"the loaded one does not run: {again}"
    else:
        want, got = (found.output.cpu().nan_to_num() for found in (own, again))
        if outputs_agree(want, got):
            return again.record(loaded)
        fault = f"its outputs are {list(want.shape)}, those of the loaded one {list(got.shape)}"
        if want.shape == got.shape:
            fault = f"outputs differ by up to {float((want - got).abs().max()):.1e}"
    raise _changed(f"{fault}; {difference}" if difference else fault)


def _changed(fault: str) -> CheckpointError:
    remedy = "Undo what was changed beside weights and config; Python saves it without by save_pretrained(verify=False)"
    return CheckpointError(f"the checkpoint would not be this model: {fault}", where="model", remedy=remedy)


def _move(loaded: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Move a loaded model to the device of another one, with the parameters of that one in place of a second copy."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        set_tensor(loaded, name, parameter)
    for name, buffer in list(loaded.named_buffers(remove_duplicate=False)):
        set_tensor(loaded, name, buffer.to(device))


def _differences(model: nn.Module, loaded: nn.Module) -> Iterator[tuple[str, bool]]:
    """Modules that differ from those which a loader builds, and whether they are of another class: these first."""
    there = dict(loaded.named_modules())
    pairs = [(path or "the model", module, there[path]) for path, module in model.named_modules() if path in there]
    for path, module, other in pairs:
        kinds = [(kind.__module__, kind.__qualname__) for kind in map(stock_class, (module, other))]
        if kinds[0] != kinds[1]:
            yield f"{path} is {type(module).__name__}, where a loader builds {type(other).__name__}", True
    for path, module, other in pairs:
        if "forward" in vars(module):
            yield f"{path} has a forward of its own", False
        elif module.extra_repr() != other.extra_repr():
            yield f"{path} is ({module.extra_repr()}), where a loader builds ({other.extra_repr()})", False
    yield from ((f"{path} has hooks", False) for path in hooks_left_out(model))


CARD = "README.md"
PAGE = "report.html"
"""For people, like the card: both may be edited or deleted."""
PLAN = "plan.json"
REPORT = "report.json"
GRAPH = "model.pt2"
"""The graph of a result for which there is no slim model of its class; its folder has no manifest."""
RUN_FILES = ("run.yaml", "recovery.json")
"""What the commands write beside a result; no manifest lists them, since they may be edited."""
_FORMAT = 3
"""Counted up when an earlier release could no longer read the file, or would miss something that it must check."""
_LOADED_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json", ".py")
"""Endings of files that loaders look for by themselves, and prefer to others."""
_LOADED_NAMES = ("adapter_config.json", "generation_config.json", "config.json")

_COPY_AGAIN = "Copy the folder again, or save the model again"
_SAVE_AGAIN = "Save the model again"


@dataclass(frozen=True)
class WeightFile:
    """A file of weights as it was written: bytes, SHA-256 of the whole file, and the shape of each tensor."""

    size: int
    sha256: str
    tensors: Mapping[str, list[int]]


@dataclass(frozen=True)
class Manifest:
    """Contents and origin of a checkpoint.

    Args:
        source: class, name and number of parameters of the dense model.
        stock: whether stock transformers loads it by its config alone.
        weights: the files of weights by name.
        files: SHA-256 of each other file that was written, by name.
        plan_digest: digest of the plan that the model came of; None if that is not known.
        forward: what one short forward pass gave, or a ``note`` why there was none; None if it was left out.
    """

    source: Mapping[str, Any]
    stock: bool
    weights: Mapping[str, WeightFile]
    files: Mapping[str, str] = field(default_factory=dict)
    plan_digest: str | None = None
    forward: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=package_versions)
    format: int = _FORMAT

    def to_json(self) -> str:
        data = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps({**data, "digest": content_digest(data)}, indent=1)

    def read_plan(self, folder: Path) -> Plan | None:
        """Read the plan of the checkpoint in a folder; None if it was saved without one."""
        return self._read(folder, PLAN, Plan.from_json)

    def read_report(self, folder: Path) -> Report | None:
        """Read the report of the checkpoint in a folder; None if it was saved without one."""
        return self._read(folder, REPORT, lambda text: Report.from_dict(json.loads(text)))

    def _read(self, folder: Path, name: str, parse: Callable[[str], T]) -> T | None:
        if name not in self.files:  # a file of this name may be the user's
            return None
        place = folder / name
        try:
            return parse(place.read_text("utf-8", "replace"))
        except OSError as error:
            raise CheckpointError("this file is missing", where=str(place), remedy=_COPY_AGAIN) from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(str(error), where=str(place), remedy=_SAVE_AGAIN) from error


def content_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content: no part of it, nor the digest of a file, can be exchanged alone."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


UNEVEN = (
    "Folders of uneven layers that Trainer or model.save_pretrained wrote are loaded by type(slim).from_pretrained, "
    "slim being the model that was trained; then save it by fxprune.save_pretrained"
)
"""What loads a folder that lacks a manifest and a modelling file."""


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the checkpoint in a folder.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is of another format.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=str(folder), remedy="Pass a folder that save_pretrained wrote")
    if not path.is_file():
        config = folder / "config.json"
        is_uneven = config.is_file() and b'"per_layer_config"' in config.read_bytes()
        remedy = UNEVEN if is_uneven else "Load a model that was not saved by fxprune with transformers"
        raise CheckpointError("missing", where=str(path), remedy=remedy)
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            what = f"written in format {data['format']}, this release reads {_FORMAT}"
            remedy = f"Load it with the release that wrote it: {data.get('versions', {}).get('fxprune')}"
            raise CheckpointError(what, where=str(path), remedy=remedy)
        if data.pop("digest", None) != content_digest(data):
            raise CheckpointError("its content was changed", where=str(path), remedy=_COPY_AGAIN)
        weights = {str(name): WeightFile(**entry) for name, entry in data.pop("weights").items()}
        found = Manifest(weights=weights, **data)
        _check_types(found)
        return found
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"not a manifest: {type(error).__name__}: {error}"
        raise CheckpointError(what, where=str(path), remedy=_SAVE_AGAIN) from error


def _check_types(manifest: Any) -> None:
    fields: dict[str, Any] = {"stock": bool, **dict.fromkeys(("source", "files", "versions"), dict)}
    fields |= {"forward": (dict, type(None)), "plan_digest": (str, type(None))}
    wrong = [name for name, kind in fields.items() if not isinstance(getattr(manifest, name), kind)]
    wrong += [name for name, digest in manifest.files.items() if not isinstance(digest, str)] if not wrong else []
    for name, file in manifest.weights.items():
        shapes = file.tensors.values() if isinstance(file.tensors, dict) else [None]
        plain = all(isinstance(shape, list) and all(type(size) is int for size in shape) for shape in shapes)
        if not plain or type(file.size) is not int or not isinstance(file.sha256, str):
            wrong.append(name)
    if wrong:
        raise TypeError(f"{wrong[0]} is of another type")


def weight_files(folder: Path) -> dict[str, WeightFile]:
    """Size, digest and tensors of each weight file in a folder, by name."""
    return {
        path.name: WeightFile(path.stat().st_size, _digest(path), _header(path))
        for path in sorted(folder.glob("*.safetensors"))
    }


def other_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder except weight files and the manifest, by name."""
    found = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".safetensors")
    return {path.name: _digest(path) for path in found if path.name != MANIFEST}


def result_files(folder: Path) -> set[str]:
    """Names of the files that an earlier result consists of: a checkpoint, or a graph; empty if there is none."""
    if (folder / MANIFEST).is_file():
        manifest = _earlier_manifest(folder)
        listed = () if manifest is None else (*manifest.weights, *manifest.files)
        return {MANIFEST, *RUN_FILES, *listed}
    is_graph = (folder / GRAPH).is_file() and (folder / PLAN).is_file()
    return {GRAPH, PLAN, REPORT, PAGE, *RUN_FILES} if is_graph else set()


def foreign_files(folder: Path) -> list[Path]:
    """Files and folders that a user put beside a result and no loader looks for.

    All that no loader looks for, if there is no result.
    """
    if not folder.is_dir():
        return []
    known = result_files(folder)
    return sorted(p for p in folder.iterdir() if p.name not in known and not _is_loaded(p.name))


def has_user_card(folder: Path) -> bool:
    """Whether the model card of a checkpoint was written or edited by the user."""
    card, manifest = folder / CARD, _earlier_manifest(folder)
    return card.is_file() and (manifest is None or _digest(card) != manifest.files.get(CARD))


def _earlier_manifest(folder: Path) -> Manifest | None:
    """The manifest of the checkpoint that a folder holds; None if it has none that can be read."""
    if (folder / MANIFEST).is_file():
        with suppress(CheckpointError):
            return read_manifest(folder)
    return None


def _is_loaded(name: str) -> bool:
    return name.endswith(_LOADED_ENDINGS) or name in _LOADED_NAMES


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check that the files beside the weights are as they were written, and that there are no others a loader uses."""
    for name, digest in manifest.files.items():
        if name in (CARD, PAGE):
            continue
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError("this file is missing", where=str(path), remedy=_COPY_AGAIN)
        if _digest(path) != digest:
            raise CheckpointError("its content was changed", where=str(path), remedy=_COPY_AGAIN)
    known = {MANIFEST, *manifest.weights, *manifest.files}
    for path in sorted(folder.iterdir()):
        if _is_loaded(path.name) and path.name not in known:
            raise CheckpointError("does not belong to this checkpoint", where=str(path), remedy="Remove it")


def check_weights(folder: Path, weights: Mapping[str, WeightFile], *, digests: bool) -> None:
    """Check that weight files are those the manifest was written for: every byte, or sizes, names and shapes alone."""
    where = str(folder / MANIFEST)
    if not weights:
        raise CheckpointError("it lists no weight file", where=where, remedy=_SAVE_AGAIN)
    for name, expected in weights.items():
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"a weight file {name!r} outside the folder", where=where, remedy=_SAVE_AGAIN)
        error = _weight_error(path, expected, digests=digests)
        if error:
            raise CheckpointError(error, where=str(path), remedy=_COPY_AGAIN)


def _weight_error(path: Path, expected: WeightFile, *, digests: bool) -> str:
    """Return how a weight file differs from its entry; empty if it does not."""
    if not path.is_file():
        return "this weight file is missing"
    held = _header(path)
    for tensor in sorted(held.keys() ^ expected.tensors.keys()):
        return f"{tensor} is not in it" if tensor in expected.tensors else f"{tensor} does not belong in it"
    for tensor, shape in expected.tensors.items():
        if held[tensor] != list(shape):
            return f"{tensor} is {held[tensor]} and should be {list(shape)}"
    size = path.stat().st_size
    if size != expected.size:
        return f"{size:,} bytes instead of {expected.size:,}"
    return "its bytes are not those that were written" if digests and _digest(path) != expected.sha256 else ""


def _header(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        what = f"truncated or not safetensors: {error}"
        raise CheckpointError(what, where=str(path), remedy="Copy the folder again") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
