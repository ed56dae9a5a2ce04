"""The process that the launcher runs: its arguments, and when garbage is collected."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_garbage_is_collected_only_once_the_module_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "some_process.py").write_text(MODULE)
    command = [sys.executable, "-m", "engine.shared.launcher", "some_process", "--flag"]
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == ["some_process", ["some_process", "--flag"], False, 0, True, True]
