"""Fixtures that more than one folder of tests uses."""

import os
from pathlib import Path

import pytest

# Tests, servers and clients share the cores here. Threads that spin while they wait would take them from each other,
# and a step then lasts many times as long. Read by OpenMP when torch is loaded, here and in the servers under test.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Kernels in Triton run in its interpreter, on a CPU. Read when a kernel is defined.
os.environ.setdefault("TRITON_INTERPRET", "1")

# It multiplies with NumPy, whose library has kernels for each kind of processor. With those for Haswell a row's sum
# depends on its place in the matrix, which on a GPU it does not. Read when NumPy is loaded.
os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1), fetched on first use."""
    if path := os.environ.get("LIGHTWELL_TEST_MODEL"):
        return Path(path)
    from server.model_paths import resolve_model

    return resolve_model("smollm2-135m").path
