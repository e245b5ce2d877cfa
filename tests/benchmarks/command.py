"""Run the command line of a benchmark in this process."""

from collections.abc import Callable, Mapping

import typer
from typer.testing import CliRunner, Result


def run_main(main: Callable[..., None], *arguments: str, env: Mapping[str, str] | None = None) -> Result:
    """The outcome of a `main` that `typer.run` starts; errors other than those of usage are raised."""
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments, env=env, catch_exceptions=False)
