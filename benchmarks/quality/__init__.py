"""Recipes and their ingredients, one changed at a time, at several ratios: `python -m benchmarks.quality`.

Everything is calibrated and tuned on one text, and measured on others and on rows of that text that were kept back.
With `--data` the texts are files of a folder; without, they are built-in ones that share no paragraph. Each row has the
protocol that it was measured by. Rows that the file of results has by the same protocol are not measured again, so
that an interrupted run resumes; slim models that were kept are measured by another protocol without another prune.
"""
