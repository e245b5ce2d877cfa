"""The text of a checkpoint's modelling file: stock classes whose blocks have widths of their own.

The modules of this package import torch, transformers, the standard library and each other, nothing else of ours.
"""
