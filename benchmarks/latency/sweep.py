"""What aligned widths buy on a device: `make bench ARGS=--sweep`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from fxprune.evaluation import measure_widths, write_widths

__all__ = ["sweep"]


def sweep(config: Any, device: str, console: Console) -> None:
    """Measure widths below those of a model, print what multiples cost, and keep it for `round_to="auto"`.

    Args:
        config: Of the model.
        device: `cpu` or `cuda`.
        console: Where to print.
    """
    widths = measure_widths(config.hidden_size, config.intermediate_size, device)
    table = Table("widths are multiples of", "time a column", title=f"{widths.device}, {config.hidden_size} wide")
    for multiple, cost in widths.costs.items():
        table.add_row(str(multiple), f"{cost:.3f}")
    console.print(table)
    console.print(f'round_to="auto" is {widths.best()} here; kept in {write_widths(widths)}', highlight=False)
