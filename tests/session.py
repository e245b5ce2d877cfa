"""What every test starts from: one thread, the same seed, a quiet transformers, traces that are remembered.

A model that is the same is traced once a session (:mod:`tests.exports`), by ``trace`` and ``prune``. What comes after
starts from :mod:`tests.remembered`: ``grouped("llama")`` is a fork of a graph with its groups, made once, and
``pruned("llama", data, ratio=0.3)`` prunes such a fork. What takes long carries the marker ``slow``: ``make test-all``.
"""

import gc
import os
import random
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.utils import logging

from fxprune.modelling.layerwise import AnyWidths
from tests.exports import remember_exports

torch.set_num_threads(1)
gc.set_threshold(20_000, 20, 20)  # what torch, transformers and remembered traces hold is large, and seldom searched
os.environ.pop("COLUMNS", None)  # what is printed is what goes to a pipe, however wide the terminal of this run is
os.environ["FXPRUNE_WIDTHS"] = os.path.join(tempfile.gettempdir(), f"fxprune-widths-{os.getpid()}.json")
logging.set_verbosity_error()
logging.disable_progress_bar()
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")
remember_exports()


def pytest_collection_finish() -> None:
    """What was imported lasts as long as the session: no search for garbage goes over it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def kept() -> Iterator[None]:
    """So does what the tests of a module remember."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture
def browser() -> str:
    """The program that shows a page; tests that ask for it carry the marker ``browser``."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium here; what is in the page is tested without")
    return found


@pytest.fixture(autouse=True)
def stock_classes() -> Iterator[None]:
    """The classes that transformers knows: a folder with code of its own that a test loads registers others."""
    known = {**vars(modeling_auto), **vars(configuration_auto)}
    mappings = [
        value for name, value in known.items() if name.endswith("_MAPPING") and hasattr(value, "_extra_content")
    ]
    before = [dict(mapping._extra_content) for mapping in mappings]
    yield
    for mapping, extra in zip(mappings, before, strict=True):
        ours = {key: value for key, value in mapping._extra_content.items() if issubclass(key, AnyWidths)}
        mapping._extra_content.clear()
        mapping._extra_content.update(extra | ours)
