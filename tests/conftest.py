"""What every test starts from: one thread, the same seed, a quiet transformers, a memory of exported programs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

from tests.exports import remember_exports

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")
remember_exports()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
