"""What the dense model said, kept for a slim one to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxprune.graph.facts import Change, Fact
from fxprune.masking.lessons import Lesson, LessonBatch, divergence, lesson_batches, logits_of

__all__ = ["Lesson", "LessonBatch", "Teacher", "divergence", "lesson_batches", "logits_of"]


@dataclass(frozen=True, eq=False)
class Teacher(Fact):
    """What the dense model said, for a slim one to say as well. It stays true whatever becomes of the weights.

    Args:
        lessons: to learn from.
        heldout: to stop by; none of it is learned from.
        heldout_from: where the held-out samples come from, in words.
    """

    about: ClassVar[Change] = "nothing"
    lessons: tuple[Lesson, ...]
    heldout: tuple[Lesson, ...]
    heldout_from: str
