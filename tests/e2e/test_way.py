"""The budget of a request: how many functions of ours a reader must know to follow one, and how many calls it makes."""

import sys
from pathlib import Path

import pytest

from tests.support.server_process import CHAT, COMPLETIONS
from tests.way.__main__ import ways

MAX_FUNCTIONS = {CHAT: 190, COMPLETIONS: 165}  # of the API process
MAX_FILES = 50
MAX_CALLS = 700
MAX_ENGINE_FUNCTIONS = 135
MAX_ENGINE_CALLS_PER_STEP = 120
STEP = "engine/core.py:Engine.step"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the budget is one of Python 3.11")
def test_a_request_stays_in_its_budget(smollm2_path: Path) -> None:
    """A function is counted once however often it is called, and those that only timers call do not count."""
    for path, (api, engine) in ways(smollm2_path).items():
        assert api.num_functions <= MAX_FUNCTIONS[path], f"{path}, {api}"
        assert api.num_files <= MAX_FILES, f"{path}, {api}"
        assert len(api.calls) <= MAX_CALLS, f"{path}, {api}"
        assert engine.num_functions <= MAX_ENGINE_FUNCTIONS, f"{path}, {engine}"
        assert len(engine.calls) <= MAX_ENGINE_CALLS_PER_STEP * engine.functions[STEP], f"{path}, {engine}"
