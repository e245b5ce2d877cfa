"""Loads :mod:`tests.session` into the processes that run tests: the one that shares them out needs no torch."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Imports of the session take seconds."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.session")
