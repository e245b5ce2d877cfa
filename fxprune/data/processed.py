"""Samples that the processor of a model makes of images, of sounds, and of rows that name them."""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxprune.data.calibration import spread
from fxprune.data.rows import is_chat, json_lines
from fxprune.data.samples import LABELS
from fxprune.errors import CalibrationError
from fxprune.graph.context import Refusal

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_KINDS = {".wav": "audio", **dict.fromkeys(_IMAGES, "image")}
_REMEDY = (
    'Give a folder of images or of .wav files, in a folder for each class if there are labels, or .jsonl with "image", '
    '"audio" or "text", and perhaps "label" or "target", in each row'
)


def needs_processor(source: str) -> bool:
    """Whether a path holds images or sounds, or rows of these or of numbers, rather than text alone."""
    path = Path(source).expanduser()
    if os.path.isdir(path):
        return True
    if path.suffix != ".jsonl" or not os.path.isfile(path):
        return False
    try:
        first = next(iter(_rows(path)), ("", {}))[1]
    except CalibrationError:  # strings, chats, or what the reader of text refuses by its line
        return False
    fields = {name for name, value in first.items() if isinstance(value, list) and not is_chat(value)} - {"messages"}
    return bool(fields or first.keys() & {"image", "audio", "label", "target"})


def processed_samples(
    source: str, processor: Any, classes: Mapping[str, int], most: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Samples of a folder or a file of rows, each a batch of one by name, with ``labels`` where a row has some.

    A folder holds images or sounds; a file in a folder with the name of a class is of this class. Rows are in .jsonl,
    with paths relative to the file: ``image``, ``audio`` and ``text`` are read; ``label`` is a class, ``target`` a text
    that is to be said. Other fields are inputs as the model takes them, such as ``input_ids``.

    Args:
        processor: of the model: a processor, an image processor, a feature extractor or a tokenizer.
        classes: numbers of classes by name.
        most: number of samples, evenly spread; None for all.

    Raises:
        CalibrationError: a file or a row cannot be read; its place is in the message.
    """
    path = Path(source).expanduser()
    rows = list(_files(path, classes) if path.is_dir() else _rows(path))
    if not rows:
        raise CalibrationError("it holds no samples", where=source, remedy=_REMEDY)
    found = []
    for where, row in spread(rows, most):
        try:
            found.append(_processed(row, path.parent, processor, classes))
        except Exception as error:  # files may be damaged, and processors are code of many authors
            raise CalibrationError(str(Refusal(error)), where=f"{source}, {where}", remedy=_REMEDY) from error
    masks = [one.get("attention_mask") for one in found]
    if all(mask is not None and bool((mask == 1).all()) for mask in masks):
        found = [{name: value for name, value in one.items() if name != "attention_mask"} for one in found]
    return found


def _files(folder: Path, classes: Mapping[str, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(folder.rglob("*")):
        kind = _KINDS.get(file.suffix.lower())
        if kind is not None:
            label = {"label": file.parent.name} if file.parent.name in classes else {}
            yield str(file.relative_to(folder)), {kind: str(file.absolute()), **label}


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for number, line in json_lines(path.read_text(encoding="utf-8-sig")):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield f"line {number}", row
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"no rows can be read: {error}", where=str(path), remedy=_REMEDY) from error


def _processed(
    row: Mapping[str, Any], folder: Path, processor: Any, classes: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    numbers = {name: value for name, value in row.items() if isinstance(value, list | int | float) and name != "label"}
    found = {name: torch.tensor(value)[None] for name, value in numbers.items()}
    given: dict[str, Any] = {}
    options: dict[str, Any] = {"return_tensors": "pt"}
    if "image" in row:
        from PIL import Image

        with Image.open(folder / row["image"]) as image:
            given["images"] = image.convert("RGB")
    if "audio" in row:
        given["audio"], options["sampling_rate"] = _sound(folder / row["audio"])
    if "text" in row:
        token = getattr(processor, "image_token", None)
        marked = token is None or "images" not in given or token in row["text"]
        given["text"] = row["text"] if marked else f"{token}{row['text']}"
    if given and processor is None:
        raise ValueError("the model has no processor that reads it")
    if given:
        several = hasattr(processor, "attributes")
        made = processor(**given, **options) if several else processor(next(iter(given.values())), **options)
        found |= {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
    if "label" in row:
        found[LABELS] = torch.tensor([classes[row["label"]] if isinstance(row["label"], str) else row["label"]])
    if "target" in row:
        tokenizer = getattr(processor, "tokenizer", processor)
        found[LABELS] = tokenizer(text_target=row["target"], return_tensors="pt").input_ids
    return found


def _sound(path: Path) -> tuple[np.ndarray[Any, Any], int]:
    """The first channel of a .wav file as numbers from -1 to 1, and its samples a second."""
    with wave.open(str(path)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        frames = file.readframes(file.getnframes())
    if width != 2:
        raise ValueError(f"it has {8 * width} bits a sample, and 16 are read")
    return np.frombuffer(frames, dtype="<i2")[::channels].astype(np.float32) / 2**15, rate
