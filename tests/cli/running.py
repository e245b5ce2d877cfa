"""Commands run in this process."""

from click.testing import CliRunner, Result
from typer.main import get_command

from fxprune.cli import app

COMMAND = get_command(app)
"""The command line, built once: a runner of typer's builds it for each call, which takes longer than a refusal."""


def invoked(*arguments: object) -> Result:
    """What came of a command that ended by itself."""
    result = CliRunner().invoke(COMMAND, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run(*arguments: object) -> tuple[int, str, str]:
    """The exit code of a command, and what it printed to its two outputs, with single blanks."""
    result = invoked(*arguments)
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


def output_of(*arguments: object) -> str:
    """What a command that ends well prints as its result, with single blanks."""
    code, printed, lines = run(*arguments)
    assert code == 0, lines
    return printed


def refused(*arguments: object) -> str:
    """The one line in which a command says what is wrong."""
    code, printed, line = run(*arguments)
    assert code == 2 and printed == "" and line.count("error: ") == 1 and "Traceback" not in line, line
    return line.partition("error: ")[2]
