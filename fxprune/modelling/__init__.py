"""Source of a checkpoint's modelling file: stock classes whose blocks have widths of their own.

The modules import torch, transformers, the standard library and each other, and nothing else of this package.
"""
