"""The README's JavaScript example, as printed, with the official client from npm. Needs node and npm."""

import shutil
import subprocess
from pathlib import Path

from tests.support.readme import readme_example
from tests.support.server_process import ServerProcess


def run(folder: Path, *command: str) -> str:
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_javascript_as_printed(server: ServerProcess, tmp_path: Path) -> None:
    assert shutil.which("node"), "this test needs node and npm (on Debian and Ubuntu: the package npm)"
    assert shutil.which("npm"), "this test needs npm (on Debian and Ubuntu: the package npm)"
    run(tmp_path, "npm", "install", "--no-audit", "--no-fund", "--no-update-notifier", "openai")
    (tmp_path / "example.mjs").write_text(readme_example("javascript", "import OpenAI", server))
    assert run(tmp_path, "node", "example.mjs").strip()
