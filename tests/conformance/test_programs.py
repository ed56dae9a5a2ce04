"""Runs programs and libraries, installed from lock files, against the scripted server: each calls a tool of its own."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.programs import PROGRAMS, Program, converse
from tests.conformance.scripted_server import ScriptedServer, scripted_server
from tests.conformance.table import ENVIRONMENTS, FOLDER

pytestmark = pytest.mark.long

LOCKED = [program for program in PROGRAMS if program.locked]


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


@pytest.mark.parametrize("program", LOCKED, ids=[program.slug for program in LOCKED])
def test_program(program: Program, server: ScriptedServer, tmp_path: Path) -> None:
    bin = FOLDER / "npm/node_modules/.bin"
    if program.registry == "npm":
        assert shutil.which("npm"), "this test needs node and npm (on Debian and Ubuntu: the package npm)"
    else:
        bin = ENVIRONMENTS / program.locked / "bin"
    assert bin.exists(), "`make test-long` installs the programs"
    trial = converse(program, bin, tmp_path, server)
    assert not trial.failure, f"{trial.failure}\n{trial.output[-3000:]}"
