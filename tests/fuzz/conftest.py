"""Models are loaded in processes of their own, which may use so much time and memory and no more."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Few variables, so that threads and their memory are those of one small process.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
MAX_LINE = 600  # characters of a message

Check = Callable[[Path, str], bool]


@pytest.fixture(scope="package")
def check() -> Iterator[Check]:
    """A function that loads a model and returns whether it was loaded; `what` is for the message of a failure.

    It fails if the model was neither loaded nor refused in one clear line.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.loader"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | ENVIRONMENT,
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
