"""The prune command on models that are no causal language models: images, sounds, rows and texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

import fxprune
from tests.cli.running import refused, shown
from tests.data.test_processed import write_image
from tests.export.small import tokenizer

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAST = ("--ratio", "0.1", "--recipe", "fast", "--protect", "0", "0")


def save_classifier(folder: Path) -> None:
    """A tiny image classifier with its processor, and images in a folder for each class."""
    names = {"label2id": {"cat": 0, "dog": 1}, "id2label": {0: "cat", 1: "dog"}}
    config = hf.ViTConfig(**SIZES, image_size=16, patch_size=4, **names)
    hf.ViTForImageClassification(config).save_pretrained(folder / "vit")
    hf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    for i in range(12):
        write_image(folder / "images" / ("cat", "dog")[i % 2] / f"{i}.png", shade=20 * i)


@pytest.mark.slow
def test_an_image_classifier_is_pruned_on_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_classifier(tmp_path)
    assert "there are no samples of that" in refused("prune", "vit", "--out", "slim")
    code, output = shown("prune", "vit", "--calibration", "images", "--dry-run", *FAST)
    assert code == 0 and "what to expect" in output, "it took samples for token ids, and divided by their number"
    code, output = shown("prune", "vit", "--calibration", "images", "--out", "slim", *FAST)
    assert code == 0 and "accuracy, 3 samples" in output and "9 samples" in output, output
    slim = hf.AutoModelForImageClassification.from_pretrained("slim", trust_remote_code=True)
    pixels = hf.AutoImageProcessor.from_pretrained("slim")(torch.zeros(3, 20, 20), return_tensors="pt").pixel_values
    assert slim(pixels).logits.shape == (1, 2) and slim.num_parameters() < 11_450
    code, output = shown("eval", "slim", "--compare", "vit", "--data", "images")
    assert code == 0 and "accuracy, 12 samples" in output and "cosine of the outputs" in output, output
    assert json.loads(Path("slim/report.json").read_text())["measured"][1][0] == "accuracy, 3 samples"


@pytest.mark.slow
def test_an_encoder_is_pruned_on_text_and_measured_by_what_it_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = tokenizer()
    hf.BertModel(hf.BertConfig(**SIZES, vocab_size=len(words))).save_pretrained("bert")
    words.save_pretrained("bert")
    Path("some.txt").write_text("red green blue " * 120)
    code, output = shown("prune", "bert", "--calibration", "some.txt", "--tokens", "16", "--out", "slim", *FAST)
    assert code == 0 and "cosine of the outputs" in output and "perplexity" not in output, output


@pytest.mark.slow
def test_an_image_with_text_decides_what_a_model_is_traced_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = tokenizer()
    text, tower = (
        hf.LlamaConfig(**SIZES, vocab_size=len(words)),
        hf.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4),
    )
    config = hf.LlavaConfig(text_config=text, vision_config=tower, image_token_index=len(words) - 1)
    hf.LlavaForConditionalGeneration(config).save_pretrained("llava")
    rows = [
        {"input_ids": [len(words) - 1] * 4 + [5, 6 + i], "pixel_values": torch.rand(3, 8, 8).tolist()}
        for i in range(10)
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words.save_pretrained("llava")
    code, output = shown("prune", "llava", "--calibration", "rows.jsonl", "--out", "slim", *FAST)
    assert code == 0 and "8 samples" in output and "same first class" in output, output
    slim = fxprune.from_pretrained("slim")
    assert slim.model.vision_tower.num_parameters() < tower_parameters(config)


def tower_parameters(config: hf.LlavaConfig) -> int:
    """Parameters of the dense tower."""
    return int(hf.AutoModel.from_config(config.vision_config).num_parameters())
