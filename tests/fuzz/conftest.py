"""Models are loaded in processes of their own, which may use so much time and memory and no more."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.support.kernel_choice import code_paths
from tests.support.sanitizer import sanitized_library, sanitizer_environment

# Few variables, so that threads and their memory are those of one small process.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
MAX_LINE = 600  # characters of a message

Check = Callable[[Path, str], bool]


def quick(first: str, *others: str) -> list[ParameterSet]:
    """Return names as parameters of a test: the first is in `make test`, the others are in long runs."""
    return [pytest.param(first), *(pytest.param(name, marks=pytest.mark.long) for name in others)]


@pytest.fixture(scope="package")
def check() -> Iterator[Check]:
    """A function that loads a model and generates a token: see `checking`."""
    with checking(["tests.fuzz.loader"], os.environ) as check:
        yield check


@pytest.fixture(scope="package")
def sanitized_check() -> Iterator[Check]:
    """A function that loads a model and runs requests, on kernels with sanitizers: see `checking`."""
    if not code_paths():
        pytest.skip("no kernels in C++ for this processor")
    code_path = code_paths()[-1]  # it takes the least time to compile
    sanitized_library(code_path)
    with checking(["tests.fuzz.sanitized_loader", code_path], sanitizer_environment()) as check:
        yield check


@contextmanager
def checking(module: list[str], environment: Mapping[str, str]) -> Iterator[Check]:
    """Return a context with a function that returns whether a model was loaded; `what` is for a failure's message.

    It fails if the model was neither loaded nor refused in one clear line.
    """
    with subprocess.Popen(
        [sys.executable, "-m", *module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**environment, **ENVIRONMENT},
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def load(path: Path, what: str) -> bool:
            print(path, file=stdin, flush=True)
            answer: dict[str, str] = json.loads(stdout.readline())
            assert "failed" not in answer, f"{what}: {answer['failed']}"
            if "refused" in answer:
                assert "\n" not in answer["refused"], what
                assert 10 < len(answer["refused"]) < MAX_LINE, (what, answer["refused"])
            return "loaded" in answer

        yield load
        stdin.close()
