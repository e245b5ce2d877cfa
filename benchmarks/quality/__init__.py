"""Recipes and their ingredients, one changed at a time, at several ratios: `python -m benchmarks.quality`.

Everything is calibrated and tuned on one text and measured on others, each once. With `--data` the texts are files of a
folder; without, they are built-in ones that share no paragraph. Rows that are in the file of results are not measured
again, so that an interrupted run resumes.
"""
