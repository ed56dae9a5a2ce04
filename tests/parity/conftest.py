"""The real model in transformers, which takes long to read."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.support.reference_model import load_reference


@pytest.fixture(scope="session")
def reference(smollm2_path: Path) -> LlamaForCausalLM:
    return load_reference(smollm2_path)
