"""What the tests of evaluation measure on."""

import json
from pathlib import Path
from typing import Any

from tests.tokens import character_tokenizer

TOKENIZER = character_tokenizer()
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps for an hour or two. " * 2
QUESTIONS = [
    {"query": f"Is {a} even?", "choices": ["no", "yes", "it may be"], "gold": (a + 1) % 2} for a in range(2, 9)
]
SCHEMAS = [
    {"context_options": ["The cup is full so it", "The cup is empty so I"], "continuation": "spills.", "gold": i % 2}
    for i in range(4)
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path
