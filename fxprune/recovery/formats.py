"""Formats of rows: instructions by the Alpaca template, chats by the model's; as token ids with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxprune.data.calibration import IGNORED
from fxprune.data.rows import BadRow, prompt_of

__all__ = ["Example", "Formatter"]

_LONGEST = 80
"""Characters of a chat template's error that are repeated: rows are named by the reason, which has to stay short."""


@dataclass(frozen=True)
class Example:
    """One sample.

    Args:
        ids: token ids.
        labels: the same, :data:`fxprune.data.calibration.IGNORED` where a token does not count in the loss.
        cut: whether it was longer than allowed.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: bool = False


@dataclass(frozen=True)
class Formatter:
    """Turns rows of instructions and chats into examples.

    Args:
        tokenizer: the model's.
        max_tokens: longest example.
        response_only: whether prompts do not count in the loss.
    """

    tokenizer: Any
    max_tokens: int
    response_only: bool

    def example(self, row: Mapping[str, Any], kind: str, where: str) -> Example | BadRow:
        """Return the example of a row, or what is wrong with it.

        Args:
            row: an instruction or a chat.
            kind: its format.
            where: its place in the data, for messages.
        """
        made = self._instruction(row) if kind == "instruction" else self._chat(row)
        if isinstance(made, str):
            return BadRow(where, made)
        ids, labels = made
        example = Example(ids[: self.max_tokens], labels[: self.max_tokens], len(ids) > self.max_tokens)
        if all(label == IGNORED for label in example.labels[1:]):
            return BadRow(where, f"no response within {self.max_tokens} tokens")
        return example

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text; with the tokens that the tokenizer puts around one, where ``special``."""
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _instruction(self, row: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | str:
        fields = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
        for name, value in fields.items():
            if not isinstance(value, str):
                return f"{name!r} is a {type(value).__name__}, not text"
            if not value.strip() and name != "input":
                return f"{name!r} is empty"
        prompt = prompt_of(fields)
        whole = self._closed(self.encode(prompt + fields["output"], special=True))
        start = _shared(whole, self.encode(prompt, special=True)) if self.response_only else 0
        return tuple(whole), tuple([IGNORED] * start + whole[start:])

    def _closed(self, ids: list[int]) -> list[int]:
        """Return the ids with the end-of-text token once at their end."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _chat(self, row: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | str:
        messages = row["messages"]
        why = _unfit(messages)
        if why:
            return why
        if not getattr(self.tokenizer, "chat_template", None):
            return "a chat, but the tokenizer has no chat template"
        try:
            whole = self._rendered(messages)
            if not self.response_only:
                return tuple(whole), tuple(whole)
            labels = [IGNORED] * len(whole)
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    start = _shared(whole, self._rendered(messages[:turn], prompt=True)) if turn else 0
                    end = _shared(whole, self._rendered(messages[: turn + 1]))
                    labels[start:end] = whole[start:end]
        except Exception as error:  # a template is a program of the tokenizer's makers, and may raise anything
            return f"the chat template refuses it: {type(error).__name__}: {str(error)[:_LONGEST]}"
        return tuple(whole), tuple(labels)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> list[int]:
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        return self.encode(text)


def _unfit(messages: Any) -> str:
    """Return what is wrong with the messages of a chat; empty where nothing is."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return "'messages' is not a list of messages"
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            return "a message without 'role' and 'content' as text"
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return "no message of the assistant"
    return ""


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens both begin with: a prompt's last one may merge with what follows it."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))
