"""Several prunes of one model, compared: what each removes, and what it costs in quality."""

from fxprune.sweep.run import sweep
from fxprune.sweep.table import Sweep, SweepRow

__all__ = ["Sweep", "SweepRow", "sweep"]
