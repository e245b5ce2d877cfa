"""Samples that processors make of images, sounds and rows."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fxprune.data.processed import needs_processor, processed_samples
from fxprune.errors import CalibrationError

Made = dict[str, torch.Tensor]


def write_image(path: Path, shade: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(path)


def write_sound(path: Path, width: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(np.array([[2**14, 0], [-(2**14), 0]], dtype=f"<i{width}").tobytes())


def see(image: Any, return_tensors: str) -> Made:
    """An image processor."""
    return {"pixel_values": torch.tensor(np.asarray(image))[None].float()}


def hear(sound: Any, return_tensors: str, sampling_rate: int) -> Made:
    """A feature extractor."""
    return {"input_values": torch.tensor(sound)[None] * sampling_rate}


class Both:
    """A processor of images with text."""

    attributes = ("image_processor", "tokenizer")
    image_token = "<image>"

    def __call__(self, images: Any, text: str, return_tensors: str) -> Made:
        ids = torch.tensor([[len(text)]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **see(images, return_tensors)}

    def tokenizer(self, text_target: str, return_tensors: str) -> Any:
        """Token ids of a text to be said."""
        return type("Encoding", (), {"input_ids": torch.tensor([[len(text_target)]])})


def test_a_folder_gives_images_with_the_classes_that_folders_name(tmp_path: Path) -> None:
    for i, name in enumerate(("dog/a.png", "cat/b.JPG", "c.png", "others/d.png")):
        write_image(tmp_path / name, shade=i)
    (tmp_path / "notes").write_text("")
    found = processed_samples(str(tmp_path), see, {"cat": 0, "dog": 1})
    assert [one.get("labels", torch.tensor([-1])).item() for one in found] == [-1, 0, 1, -1]
    assert all(one["pixel_values"].shape == (1, 3, 4, 3) for one in found)
    assert len(processed_samples(str(tmp_path), see, {}, most=2)) == 2


def test_sounds_are_read_from_minus_one_to_one(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav")
    (found,) = processed_samples(str(tmp_path), hear, {})
    assert found["input_values"].tolist() == [[4000.0, -4000.0]]
    write_sound(tmp_path / "b.wav", width=4)
    with pytest.raises(CalibrationError, match=r"b\.wav: ValueError: it has 32 bits a sample"):
        processed_samples(str(tmp_path), hear, {})


def test_rows_name_what_a_processor_reads_or_hold_what_a_model_takes(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    rows = [{"image": "a.png", "text": "what", "target": "red"}, {"image": "a.png", "text": "<image>", "label": "cat"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second = processed_samples(str(file), Both(), {"cat": 5})
    assert first["input_ids"].item() == len("<image>what") and second["input_ids"].item() == len("<image>")
    assert first["labels"].tolist() == [[3]] and second["labels"].tolist() == [5]
    assert "attention_mask" not in first, "it has nothing to say"
    file.write_text('{"input_ids": [3, 4], "start_positions": 1}')
    (plain,) = processed_samples(str(file), None, {})
    assert plain["input_ids"].tolist() == [[3, 4]] and plain["start_positions"].tolist() == [1]


def test_text_alone_needs_no_processor(tmp_path: Path) -> None:
    texts = ['{"text": "red"}', '{"messages": []}', '{"instruction": "a", "output": "b"}']
    others = ['{"image": "a.png"}', '{"text": "a", "label": 1}', '{"input_ids": [1]}']
    for lines, wanted in ((texts, False), (others, True)):
        for i, line in enumerate(lines):
            (tmp_path / f"{i}.jsonl").write_text(line)
            assert needs_processor(str(tmp_path / f"{i}.jsonl")) == wanted, line
    assert needs_processor(str(tmp_path)) and not needs_processor(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", '{"image": "none.png"}', "line 1: FileNotFoundError"),
        ("rows.jsonl", '{"label": "cow"}', "line 1: KeyError: 'cow'"),
        ("rows.jsonl", "[1]", "line 1 is no object"),
        ("empty/notes", "", "it holds no samples"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(CalibrationError, match=words):
        processed_samples(str(path if path.suffix else path.parent), see, {"cat": 0})
