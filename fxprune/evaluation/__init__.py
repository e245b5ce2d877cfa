"""Evaluation: perplexity on texts, zero-shot accuracy on tasks, speed of generation and of widths."""

from fxprune.data.named import CORPORA
from fxprune.evaluation.agreement import Agreement, agreement
from fxprune.evaluation.comparison import Evaluation, Reference, evaluate
from fxprune.evaluation.generation import Answers, Generation, answer_questions, compare_answers, plain_questions
from fxprune.evaluation.perplexity import Divergence, Perplexity, logits_of, perplexity, text_perplexity
from fxprune.evaluation.speed import Widths, measure_widths, read_widths, write_widths
from fxprune.evaluation.tasks import PAPER_TASKS, LocalTask, TaskScore, zero_shot

__all__ = [
    "CORPORA",
    "PAPER_TASKS",
    "Agreement",
    "Answers",
    "Divergence",
    "Evaluation",
    "Generation",
    "LocalTask",
    "Perplexity",
    "Reference",
    "TaskScore",
    "Widths",
    "agreement",
    "answer_questions",
    "compare_answers",
    "evaluate",
    "logits_of",
    "measure_widths",
    "perplexity",
    "plain_questions",
    "read_widths",
    "text_perplexity",
    "write_widths",
    "zero_shot",
]
