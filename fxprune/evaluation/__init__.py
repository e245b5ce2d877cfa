"""Measurements of what a model is worth: perplexity on texts, accuracy on tasks without examples."""

from fxprune.evaluation.corpora import CORPORA
from fxprune.evaluation.measure import Evaluation, evaluate
from fxprune.evaluation.perplexity import Perplexity, logits_of, perplexity, text_perplexity
from fxprune.evaluation.tasks import LocalTask
from fxprune.evaluation.zeroshot import PAPER_TASKS, TaskScore, zero_shot

__all__ = [
    "CORPORA",
    "PAPER_TASKS",
    "Evaluation",
    "LocalTask",
    "Perplexity",
    "TaskScore",
    "evaluate",
    "logits_of",
    "perplexity",
    "text_perplexity",
    "zero_shot",
]
