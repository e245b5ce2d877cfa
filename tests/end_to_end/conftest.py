"""After the random networks: how many used each op, and how many lost units that run through it."""

from collections import Counter

from _pytest.terminal import TerminalReporter

__all__ = ["COUNTS", "pytest_terminal_summary"]

COUNTS = "random networks"
"""The property of a test that holds its counts; it reaches this process from whichever ran the test."""


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Print the counts of all tests as one table."""
    seen: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, counts in report.user_properties:
            if name == COUNTS:
                seen.update(counts)
    networks = seen["networks"]
    if not networks:
        return
    groups = seen["exact"] + seen["renormalised"]
    terminalreporter.section(COUNTS)
    terminalreporter.write_line(
        f"{networks} networks, {seen['at two sizes']} of them at two sizes; {groups} groups, {seen['renormalised']} of "
        "them under a statistic; of 1,000 networks, how many used an op, and lost units that run through it:"
    )
    used = Counter({name.removeprefix("used "): n for name, n in seen.items() if name.startswith("used ")})
    cells = [
        f"{name} {1000 * n / networks:.0f}/{1000 * seen[f'cut {name}'] / networks:.0f}"
        for name, n in used.most_common()
    ]
    for i in range(0, len(cells), 3):
        terminalreporter.write_line("  " + "".join(f"{cell:<39}" for cell in cells[i : i + 3]).rstrip())
