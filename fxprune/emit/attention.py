"""A model run under each attention implementation of its class, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.graph.attempts import Refusal, attempt
from fxprune.graph.silence import quiet

__all__ = ["attending", "configs_of", "implementations"]

_HELD = "_attn_implementation_internal"

_SWITCHABLE = {"eager": None, "sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
"""What runs on every device, and the attribute of a class that says whether it has it."""


def implementations(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the attention implementations that a model can be run under here, its own first.

    Those that ask for a kind of device or a package of their own, as flash attention does, are left out unless the
    model runs under one.
    """
    own = str(model.config._attn_implementation or "eager")
    if not model._can_set_attn_implementation():
        return (own,)
    had = (name for name, flag in _SWITCHABLE.items() if flag is None or getattr(model, flag, False))
    return tuple(dict.fromkeys((own, *had)))


@contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[bool]:
    """Run a model under an attention implementation while the context lasts; yields whether it takes that one.

    What transformers would compile first runs as it is: compiling takes seconds for each shape.

    Args:
        model: its configs are as they were afterwards.
        implementation: one of those that :func:`implementations` returns.
    """
    held = [(config, vars(config)[_HELD]) for config in configs_of(model) if _HELD in vars(config)]
    try:
        with quiet(), torch.compiler.set_stance("force_eager"):
            taken = implementation == model.config._attn_implementation or not isinstance(
                attempt(model.set_attn_implementation, implementation), Refusal
            )
            yield taken
    finally:
        for config, value in held:
            vars(config)[_HELD] = value


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the config of a model, those of its modules, and those nested in them."""
    pending = [model.config, *(vars(module).get("config") for module in model.modules())]
    found: dict[int, PreTrainedConfig] = {}
    while pending:
        config = pending.pop(0)
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            pending.extend(vars(config).values())
    return list(found.values())
