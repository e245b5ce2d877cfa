"""What a user may name as a model, told apart and checked before anything is read or fetched. It needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxprune.cli.demo import DEMO, demo_gguf
from fxprune.cli.hub import check_hub
from fxprune.errors import FxpruneError, UnsupportedModelError
from fxprune.pipeline.arguments import MANIFEST

__all__ = ["check_exists", "check_model", "is_config_alone", "is_gguf"]

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LONGEST_ID = 96
"""Characters of an id, as the hub allows."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")

_REMEDY = "Pass a folder that save_pretrained wrote, a GGUF file, an id on a hub, or 'demo'"

_ELSEWHERE = (
    "Programs that read GGUF files run it; for this command name the folder that it was exported from, or prune to a "
    "folder"
)

_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How classes end that say what comes next in a text."""


def is_gguf(model: str) -> bool:
    """Return whether a user named a GGUF file."""
    return Path(model).suffix == ".gguf" and Path(model).expanduser().is_file()


def is_config_alone(model: str, gguf_file: str | None) -> bool:
    """Return whether a user named a folder without weights, of which no more than the shape of a model can be told."""
    path = Path(model).expanduser()
    return model != DEMO and gguf_file is None and path.is_dir() and not _has_weights(path)


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def check_exists(model: str) -> None:
    """Refuse a name that means a path, with nothing there that could be a model; and the demo model where it is not.

    Raises:
        FxpruneError: says what was found in its place.
    """
    path = Path(model).expanduser()
    if model == DEMO:
        demo_gguf()
    elif path.is_file():
        _check_file(path)
    elif not model or (not path.exists() and (path.is_symlink() or _is_path(model))):
        raise FxpruneError("no such folder or file", where=model or "MODEL", remedy=_REMEDY)
    elif path.exists() and not path.is_dir():
        raise FxpruneError("it is neither a folder nor a file", where=model, remedy=_REMEDY)


def check_model(model: str, gguf_file: str | None, *, with_weights: bool = False) -> None:
    """Refuse a model that is not there, is none, or does not say what comes next in a text; a hub is asked once.

    Args:
        model: what the user named.
        gguf_file: inside the folder.
        with_weights: whether its weights have to be there, too.

    Raises:
        FxpruneError: says what was found in its place.
    """
    check_exists(model)
    path = Path(model).expanduser()
    if model != DEMO and path.is_dir():
        _check_folder(path, gguf_file, with_weights=with_weights)
    elif gguf_file is not None and (model == DEMO or path.is_file()):
        raise FxpruneError("it names a file inside a folder", where="gguf_file", remedy=f"Leave it out with {model}")
    elif model != DEMO and not path.exists():
        check_hub(model)


def _is_path(model: str) -> bool:
    """Whether a name of nothing that is there means a path, and not an id on a hub."""
    if not _HUB_ID.fullmatch(model) or len(model) > _LONGEST_ID or model.endswith((".gguf", ".safetensors")):
        return True
    owner, slash, _ = model.partition("/")
    return bool(slash) and Path(owner).is_dir()


def _check_file(path: Path) -> None:
    if path.suffix != ".gguf":
        raise FxpruneError("it is a file, and no .gguf", where=str(path), remedy=_REMEDY)
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise FxpruneError(f"it is no GGUF file: it starts with {start!r}", where=str(path), remedy=_REMEDY)
    _check_layers(path)


def _check_layers(path: Path) -> None:
    """Refuse a GGUF file that transformers cannot read: one that is cut off, or whose layers differ."""
    from fxprune.export.gguf.format import general_archs, layers_differ, read_header

    try:
        header = read_header(path)
    except (OSError, ValueError) as error:
        remedy = "Fetch or export it again"
        raise FxpruneError(f"it is no whole GGUF file: {error}", where=str(path), remedy=remedy) from error
    name = header.get("general.architecture")
    if name in general_archs():
        what = "a GGUF file with uneven layers" if layers_differ(header) else f"a GGUF file of the architecture {name}"
        raise UnsupportedModelError(f"it is {what}, which transformers cannot read", where=str(path), remedy=_ELSEWHERE)


def _check_folder(folder: Path, gguf_file: str | None, *, with_weights: bool) -> None:
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise FxpruneError(f"there is no {gguf_file} in it", where=str(folder), remedy=_inside(folder))
        _check_file(folder / gguf_file)
        return
    _check_task(folder, _config(folder))
    if with_weights and not _has_weights(folder):
        raise FxpruneError("there is a config and no file of weights", where=str(folder), remedy=_REMEDY)


def _check_task(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model that does not say what comes next in a text, and say which call prunes it."""
    classes = [name for name in config.get("architectures") or () if isinstance(name, str)]
    other = classes and not any(name.endswith(_GENERATES) for name in classes)
    encodes = config.get("is_encoder_decoder") is True
    if (folder / MANIFEST).is_file() or config.get("auto_map") or not (other or encodes):
        return
    name = classes[0] if classes else "AutoModel"
    raise UnsupportedModelError(
        f"it holds a {name} ({config['model_type']}); the commands are for models that say what comes next in a text",
        where=str(folder),
        remedy=f"Prune it from Python: fxprune.prune(transformers.{name}.from_pretrained({str(folder)!r}), "
        "importance='l2')",
    )


def _config(folder: Path) -> dict[str, Any]:
    """Return the config in a folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise FxpruneError("cannot be loaded: there is no config.json in it", where=str(folder), remedy=_inside(folder))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FxpruneError(f"it is not JSON: {error}", where=str(file), remedy=_REMEDY) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise FxpruneError("it names no 'model_type'", where=str(file), remedy=_REMEDY)
    return config


def _inside(folder: Path) -> str:
    """Return what to do with a folder that is not what it was taken for."""
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if found:
        return f"Name the file: {folder / found[0]}"
    if (folder / "adapter_config.json").is_file():
        return "It is an adapter: merge it into its model, and save that"
    return _REMEDY
