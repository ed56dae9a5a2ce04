"""The process that the launcher runs: its arguments, and when garbage is collected."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

MODULE = """
import gc, json, sys
from engine.shared.launcher import collect_garbage

loaded = [object() for _ in range(10)]
at_import = gc.isenabled()

def main():
    before = gc.get_freeze_count()
    collect_garbage()
    print(json.dumps([__name__, sys.argv, at_import, before, gc.isenabled(), gc.get_freeze_count() > 1000]))
"""


def launch(folder: Path, module: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    (folder / "some_process.py").write_text(module)
    command = [sys.executable, "-m", "engine.shared.launcher", "some_process", *flags]
    environment = {"PYTHONPATH": f"{ROOT}:{folder}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_garbage_is_collected_only_once_the_module_is_loaded(tmp_path: Path) -> None:
    done = launch(tmp_path, MODULE, "--flag")
    assert json.loads(done.stdout) == ["some_process", ["some_process", "--flag"], False, 0, True, True]


@pytest.mark.checklist("F11")
@pytest.mark.parametrize(
    ("error", "is_short"),
    [
        ("ImportError('lib.so: failed to map segment from shared object')", True),
        ("MemoryError()", True),
        ("ImportError('no name x')", False),
    ],
)
def test_a_module_for_which_there_is_no_memory(tmp_path: Path, error: str, *, is_short: bool) -> None:
    done = launch(tmp_path, f"raise {error}")
    assert done.returncode == 1
    assert ("there is not enough memory to load some_process" in done.stderr) == is_short
    assert ("Traceback" in done.stderr) != is_short
