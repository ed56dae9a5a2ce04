"""The real model in transformers, which takes long to read."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def reference(smollm2_path: Path) -> Any:
    # Loads Triton, which must not happen before tests/conftest.py has chosen its interpreter.
    from tests.support.reference_model import load_reference

    return load_reference(smollm2_path)
