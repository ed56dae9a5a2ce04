"""Fixtures shared by several folders of tests."""

import os
import signal
from functools import cache
from pathlib import Path

import httpx
import pytest
from hypothesis import settings

from tests.support.end_with_run import end_with_this_process
from tests.support.paths import ROOT
from tests.support.suite import SuiteReport, in_slice

# Tests, servers and clients share the cores. With spinning OpenMP threads a step would take many times as long. OpenMP
# reads the variable when torch is loaded, here and in the servers under test.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The interpreter multiplies with NumPy, whose OpenBLAS has kernels for each processor type. With the Haswell kernels a
# row's result depends on its position in the matrix, unlike on a GPU. Read when NumPy is loaded.
os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"

# Their tests wait for processes, clients and browsers: in `make test-long`, one that fails gets a second try, which the
# report counts. `make test` has no second try.
IN_REAL_TIME = ("conformance", "e2e", "web")

# Each client of httpx reads all certificates, which takes longer than most requests to a server under test.
httpx._transports.default.create_ssl_context = cache(httpx.create_ssl_context)  # type: ignore[attr-defined]

settings.register_profile("no deadline", deadline=None)  # other jobs on the machine can make one example slow
settings.load_profile("no deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lightwell")
    group.addoption("--slice", metavar="K/N", help="run the K-th of N parts of the tests, which depend on their names")
    group.addoption("--report", metavar="FILE", type=Path, help="write what the run found, and its time by folder")
    group.addoption("--budget", metavar="MINUTES", type=float, help="fail if the run takes a third longer than this")


def pytest_configure(config: pytest.Config) -> None:
    end_with_this_process()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background, and by what is started
    # Triton kernels run in the interpreter, on the CPU; but with `-m gpu`, on the GPU. Read when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "0" if config.option.markexpr == "gpu" else "1")
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist leaves this to its parent
        config.pluginmanager.register(SuiteReport(config.getoption("--report"), config.getoption("--budget")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if part := config.getoption("--slice"):
        selected = [item for item in items if in_slice(item.nodeid, part)]
        config.hook.pytest_deselected(items=[item for item in items if not in_slice(item.nodeid, part)])
        items[:] = selected
    if not config.pluginmanager.hasplugin("rerunfailures"):  # as in `make test`
        return
    for item in items:
        folder, *_ = item.path.relative_to(ROOT / "tests").parts
        if folder in IN_REAL_TIME and item.get_closest_marker("exact") is None:
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(scope="session", autouse=True)
def runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep servers under test out of the folder in which `lightwell chat` looks for those of the user."""
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("runtime"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1), downloaded on first use."""
    if path := os.environ.get("LIGHTWELL_TEST_MODEL"):
        return Path(path)
    from server.model_paths import resolve_model

    return resolve_model("smollm2-135m").path


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """The GGUF file of Gemma 3 270M (pretrained, Q4_K_M), downloaded on first use."""
    pytest.importorskip("server.parts.hub")
    from server.model_paths import resolve_model

    return resolve_model("gemma3:270m").path
