"""The state of torch and of models around a call: what a user has set for own code is not for ours to compute in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from fxprune.graph.compat import forgetting

__all__ = ["evaluating", "neutral", "own_randomness"]

_DEVICES = ("cpu", "cuda", "xpu", "mps")
"""Those that autocast knows."""


@contextmanager
def neutral() -> Iterator[None]:
    """Compute as outside of any context of torch: with gradients, in the dtypes of the tensors, on the CPU by default.

    So a call does the same under ``torch.inference_mode()``, ``torch.no_grad()``, ``torch.autocast`` and
    ``torch.device`` as without. Code that was compiled runs as it was written, and torch remembers nothing of the call.
    Also as a decorator.
    """
    with ExitStack() as stack:
        stack.enter_context(forgetting())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":  # each context in force costs every call of torch some time
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch, on all devices, as they were before the context."""
    python, numbers = random.getstate(), np.random.get_state()
    device = torch.accelerator.current_accelerator()
    kind = "cuda" if device is None else device.type
    try:
        with torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while the context lasts; each of its modules is then as it was."""
    held = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in held:
            module.training = training
