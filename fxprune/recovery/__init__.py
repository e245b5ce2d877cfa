"""Recovery of lost quality: low-rank updates of the pruned projections, trained briefly and merged.

Names are imported when they are first used, so that the declaration of settings needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxprune.data.rows import BadRow
    from fxprune.recovery.data import DataReport
    from fxprune.recovery.lora import Targets
    from fxprune.recovery.run import Recovery, recover
    from fxprune.recovery.settings import RecoverySettings
    from fxprune.recovery.train import Distillation

__all__ = ["BadRow", "DataReport", "Distillation", "Recovery", "RecoverySettings", "Targets", "recover"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    places = ("run", "settings", "train", "lora", "data")
    return next(vars(module)[name] for place in places if name in vars(module := import_module(f"{__name__}.{place}")))
