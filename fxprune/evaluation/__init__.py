"""Evaluation: perplexity on texts, zero-shot accuracy on tasks, speed of generation and of widths."""

from fxprune.evaluation.comparison import Evaluation, evaluate
from fxprune.evaluation.perplexity import CORPORA, Perplexity, logits_of, perplexity, text_perplexity
from fxprune.evaluation.speed import Widths, measure_widths, read_widths, write_widths
from fxprune.evaluation.tasks import PAPER_TASKS, LocalTask, TaskScore, zero_shot

__all__ = [
    "CORPORA",
    "PAPER_TASKS",
    "Evaluation",
    "LocalTask",
    "Perplexity",
    "TaskScore",
    "Widths",
    "evaluate",
    "logits_of",
    "measure_widths",
    "perplexity",
    "read_widths",
    "text_perplexity",
    "write_widths",
    "zero_shot",
]
