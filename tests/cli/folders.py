"""Small folders of models for tests of the command line, and folders and files that are something else."""

import json
import shutil
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import tiny


def save_tiny(folder: Path) -> None:
    """Save a tiny model with a tokenizer of three words."""
    tiny("llama").save_pretrained(folder)
    _words({"<unk>": 0, "red": 1, "green": 2, "blue": 3}).save_pretrained(folder)


def _words(ids: dict[str, int]) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def _write_wrong_models(folder: Path) -> None:
    """Write models that look like some: with weights that are not there, or not whole, or not numbers."""
    good = folder / "model"
    config, weights = json.loads((good / "config.json").read_text()), load_file(good / "model.safetensors")
    name = next(key for key, value in weights.items() if value.dim() == 2 and ".1." in key)
    others = {key: value for key, value in weights.items() if key != name}
    held = {
        "less": others,
        "shapes": {**others, name: torch.zeros(3, 3)},
        "nan": {**others, name: torch.full_like(weights[name], torch.nan)},
        "no-tokens": weights,
        "foreign": weights,
        "no-size": weights,
        "no-heads": weights,
    }
    changed = {"no-size": {"hidden_size": "many"}, "no-heads": {"num_attention_heads": 0}}
    for place, tensors in held.items():
        (folder / place).mkdir()
        (folder / place / "config.json").write_text(json.dumps({**config, **changed.get(place, {})}))
        save_file(tensors, folder / place / "model.safetensors", metadata={"format": "pt"})
    _words({"<unk>": 9999, "red": 1}).save_pretrained(folder / "foreign")
    shutil.copytree(good, folder / "cut")
    (folder / "cut/model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:5000])
    for file in good.glob("token*"):
        shutil.copy(file, folder / "nan")


def write_gguf(path: Path, arch: str, widths: int | list[int]) -> None:
    """Write a GGUF file of two blocks that holds entries and no tensors."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_rope_freq_base(1e4)
    writer.add_feed_forward_length(widths)
    writer.add_tokenizer_model("gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fill_with_wrong_things(folder: Path) -> None:
    """Make the folders and files that `wrong_uses.txt` names: what is no model, no text, no run, or in the way."""
    configs = {
        "no-json": "{",
        "no-type": "{}",
        "list-json": "[]",
        "no-weights": (folder / "model/config.json").read_text(),
        "encoder": json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}),
        "vision": json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"]}),
        "both": json.dumps(
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
        ),
    }
    files = {
        "nothing/notes": "",
        "adapter/adapter_config.json": "{}",
        "holds-gguf/some.gguf": "none",
        "full/notes": "mine",
        "full.gguf/notes": "mine",
        "deep/folder/notes": "mine",
        "text": "red green blue",
        "text.txt": "red green blue " * 50,
        "fake.gguf": "fake\0",
        "taken.gguf": "mine",
        "taken.pt2": "mine",
        "empty.txt": "",
        "blank.txt": "\n \n",
        "strange.txt": "calibrate\nnonsense\n",
        "broken.json": "{",
        "other.json": '[{"question": "?"}]',
        "other.jsonl": '{"text": "red"}\n{"question": "?"}\n',
        "numbers.json": "[3]",
        "pairs.json": json.dumps([{"instruction": word, "output": "red"} for word in ("red", "green", "blue")]),
        "none.json": "[]",
        "list.yaml": "- model\n",
        "broken.yaml": "model: [\n",
        "unknown.yaml": "model: model\nout: out\nratoi: 0.2\n",
        "nested.yaml": "model: model\nout: out\nratio: [{mlp: 0.2}]\n",
        "wrong.yaml": "model: model\nout: out\nratio: much\n",
        "percent.yaml": "model: model\nout: out\nratio: 20\n",
        "twice.yaml": "model: model\nout: out\nratio: 0.2\nratio: 0.3\n",
        "both.yaml": "model: model\nout: out\nin_place: true\nin-place: false\n",
        "itself.yaml": "model: model\nout: out\nconfig: good.yaml\n",
        "deep.yaml": "model: " + "[" * 3000,
        "true.yaml": "model: model\nout: true\n",
        "no.yaml": "model: model\nout: out\nnorm: no\n",
        "none.yaml": "model: model\nout: out\nkinds: []\n",
        "two.yaml": "model: model\n---\nout: out\n",
        "code.yaml": '!!python/object/apply:os.system ["touch out"]\n',
        "day.yaml": "model: model\nout: out\nseed: 2026-02-31\n",
        "zero.yaml": 'model: model\nout: "o\\0ut"\n',
        "short.parquet": "PAR1",
        "marked.json": "\ufeff" + '[{"text": "red green"}]',
        "good.yaml": "model: model\nout: out\nratio: 0.2\n",
        **{f"{name}/config.json": text for name, text in configs.items()},
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "loop").symlink_to("loop")
    _write_wrong_models(folder)
    write_gguf(folder / "uneven.gguf", "deci", [88, 66])
    write_gguf(folder / "even.gguf", "deci", 88)
    (folder / "cut.gguf").write_bytes((folder / "uneven.gguf").read_bytes()[:90])
    (folder / "binary.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "latin.txt").write_text("schön", encoding="latin-1")
