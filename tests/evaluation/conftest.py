"""The model that the tests of evaluation measure."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from tests.models import tiny


@pytest.fixture(scope="package")
def model() -> PreTrainedModel:
    return tiny("llama")
