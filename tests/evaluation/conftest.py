"""The models that the tests of evaluation measure."""

import pytest
from transformers import PreTrainedModel

import fxprune
from tests import remembered
from tests.models import tiny


@pytest.fixture(scope="package")
def model() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="package")
def slim() -> fxprune.Result:
    return remembered.pruned("llama", importance="l2", protect=())
