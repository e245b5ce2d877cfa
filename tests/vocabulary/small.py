"""Tiny tokenizers of every kind, trained on lines in several scripts, and lines to write with them."""

import functools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertTokenizer, PreTrainedTokenizerFast

ENGLISH, _OTHERS = (
    line.split() for line in Path(__file__).with_name("words.txt").read_text(encoding="utf-8").splitlines()
)
"""English words, and words in other languages and scripts, code, numbers and emoji."""

_SPACES = (" ", " ", " ", "  ", "\n", "\t", "\n\n    ")


def lines(count: int = 1000, seed: int = 0) -> list[str]:
    """Lines of words and blanks in several scripts, the same at every call."""
    draw = random.Random(seed)
    words = [*ENGLISH, *_OTHERS]
    return [
        "".join(draw.choice(words) + draw.choice(_SPACES) for _ in range(draw.randint(1, 9))) + draw.choice(words)
        for _ in range(count)
    ]


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def _train(made: Tokenizer, trainer: Any, size: int, special: Sequence[str] = SPECIAL, **more: Any) -> None:
    """Train a tokenizer with ``size`` tokens on some lines."""
    options = {"vocab_size": size, "special_tokens": list(special), "show_progress": False, **more}
    made.train_from_iterator(lines(400, 1), trainer(**options))


def _bytes(split: str | None) -> Tokenizer:
    """Byte pair encoding over bytes; ``split`` is the pattern by which text is split first."""
    made = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    cut = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*cut, own])
    made.decoder = decoders.ByteLevel()
    _train(made, trainers.BpeTrainer, 700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return made


def _characters(prepend: bool) -> Tokenizer:
    """Byte pair encoding over characters with bytes for others, every merge of two tokens that gives a third among."""
    steps = [normalizers.Prepend("▁")] if prepend else []
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    whole = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    _train(made, trainers.BpeTrainer, 500, whole, limit_alphabet=90)
    spec = json.loads(made.to_str())
    vocabulary = spec["model"]["vocab"]
    merged = sorted((number, text) for text, number in vocabulary.items() if len(text) > 1 and text not in whole)
    spec["model"]["merges"] = [
        [text[:place], text[place:]]
        for _, text in merged
        for place in range(1, len(text))
        if text[:place] in vocabulary and text[place:] in vocabulary
    ]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIAL]
    spec["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(spec))


def _scored(byte_fallback: bool) -> Tokenizer:
    """A unigram language model over words that begin with a mark."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    _train(made, trainers.UnigramTrainer, 400, unk_token="<unk>")
    if not byte_fallback:
        return made
    spec = json.loads(made.to_str())
    characters = sorted({text for text, _ in spec["model"]["vocab"] if len(text) == 1 and ord(text) > 127} - {"▁"})
    few = set(characters[::2])  # are written by bytes
    vocabulary = [entry for entry in spec["model"]["vocab"] if not few & set(entry[0])]
    lowest = min(score for _, score in vocabulary)
    spec["model"]["vocab"] = vocabulary + [[f"<0x{byte:02X}>", lowest - 1] for byte in range(256)]
    spec["model"]["byte_fallback"] = True
    found = Tokenizer.from_str(json.dumps(spec))
    found.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return found


def _longest() -> Tokenizer:
    """WordPiece over lower case."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _train(made, trainers.WordPieceTrainer, 500, special)
    made.post_processor = processors.BertProcessing(("[SEP]", made.token_to_id("[SEP]")), ("[CLS]", 2))
    return made


_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: _bytes(None),
    "qwen": lambda: _bytes(_QWEN),
    "llama": lambda: _characters(prepend=True),
    "gemma": lambda: _characters(prepend=False),
    "t5": lambda: _scored(byte_fallback=False),
    "unigram with bytes": lambda: _scored(byte_fallback=True),
    "bert": _longest,
}
"""Tokenizers by what they are like."""


@functools.cache
def tokenizer(kind: str) -> Any:
    """A tokenizer of a kind with a template, a chat token added behind all others, and special tokens by name."""
    made = KINDS[kind]()
    if kind == "bert":
        return BertTokenizer(tokenizer_object=made)
    start, end = made.token_to_id("<s>"), made.token_to_id("</s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", start), ("</s>", end)]
    )
    made.add_tokens(
        [AddedToken("<|im_start|>", special=True, normalized=False), AddedToken("<think>", normalized=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
