"""Fixtures that more than one folder of tests uses."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1), fetched on first use."""
    if path := os.environ.get("LIGHTWELL_TEST_MODEL"):
        return Path(path)
    from server.models import resolve_model

    return resolve_model("smollm2-135m").path
