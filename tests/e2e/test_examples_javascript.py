"""The JavaScript example, unchanged, with the official client from npm. Needs node and npm."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.server_process import ServerProcess


def run(folder: Path, *command: str, **environment: str) -> str:
    """Return what a command prints. Fails if the command fails."""
    process = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_chat_in_javascript(server: ServerProcess, tmp_path: Path) -> None:
    assert shutil.which("node"), "this test needs node and npm (on Debian and Ubuntu: the package npm)"
    assert shutil.which("npm"), "this test needs npm (on Debian and Ubuntu: the package npm)"
    run(tmp_path, "npm", "install", "--no-audit", "--no-fund", "--no-update-notifier", "openai")
    shutil.copy(ROOT / "examples/chat.mjs", tmp_path)
    assert run(tmp_path, "node", "chat.mjs", OPENAI_BASE_URL=f"{server.url}/v1").strip()
