"""The dense model as teacher of a model with fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.trace.inputs import without_cache
from fxprune.vocabulary.alignment import retokenised
from fxprune.vocabulary.prune import PrunedVocabulary


@dataclass(frozen=True, eq=False)
class DenseTeacher:
    """The dense model, in the tokens that stay.

    It reads a text in its own tokens. Where both tokenizers end one, its probability of a token that went is that of
    the first token which now writes it. Within such a token, the tokens that write it are known.

    Args:
        model: runs on token ids of the dense model.
        tokenizer: its tokenizer.
        words: the tokenizer of the tokens that stay.
        first: the new id of the first token that writes each token; for ids of none the number of those that stay.
        stay: this number.
    """

    model: Callable[..., Any]
    tokenizer: Any
    words: Any
    first: Tensor
    stay: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, found: PrunedVocabulary) -> DenseTeacher:
        """The teacher of a pruned vocabulary."""
        rows, stay = found.report.rows
        first = torch.full((rows,), stay)
        every = sorted(found.tokens.every)
        first[torch.tensor(every)] = torch.tensor([row[0] for row in found.rewritten([number] for number in every)])
        return cls(model, tokenizer, found.tokenizer, first, stay)

    def log_probabilities(self, ids: Tensor) -> Tensor | None:
        """Log-probabilities of next tokens ``(tokens, tokens that stay)`` in a text ``(tokens,)``.

        None if the text is not written by the same ids again.
        """
        found = retokenised(ids.tolist(), self.words, self.tokenizer)
        if found is None:
            return None
        theirs, places = found
        used = (places.ours > 0) & (places.theirs > 0)
        with torch.no_grad():
            logits = self.model(input_ids=theirs[None], **without_cache(self.model)).logits[0]
        result = torch.zeros(len(ids), self.stay + 1)
        result[torch.arange(len(ids) - 1), ids[1:]] = 1.0
        likely = logits[places.theirs[used] - 1].float().softmax(-1)
        result[places.ours[used] - 1] = torch.zeros(len(likely), self.stay + 1).index_add_(1, self.first, likely)
        return result[:, :-1].clamp_min(torch.finfo(torch.float32).tiny).log()
