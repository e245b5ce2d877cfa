"""Blocks that are alike: found in a run on fake tensors, exported once, and copied."""
