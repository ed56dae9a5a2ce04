"""How a download is shown, in a terminal and elsewhere."""

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import pytest

from server.parts.hub.download import Lines

MB = 10**6


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A line every five seconds, and one at the end."""
    now = 100.0
    lines = Lines(lambda: now)
    lines.start("tiny.gguf", 100 * MB, 500 * MB)
    for _ in range(100):
        now += 0.2
        lines.advance(4 * MB)
    assert capsys.readouterr().err.splitlines() == [
        "Downloading tiny.gguf: 40 %, 200 MB of 500 MB, 20 MB/s, 15 s left",
        "Downloading tiny.gguf: 60 %, 300 MB of 500 MB, 20 MB/s, 10 s left",
        "Downloading tiny.gguf: 80 %, 400 MB of 500 MB, 20 MB/s, 5 s left",
        "Downloading tiny.gguf: 100 %, 500 MB of 500 MB, 20 MB/s",
    ]


CODE = """
from server.parts.hub.download import new_progress
progress = new_progress(True)
progress.say("[bold]a line[/bold]")
progress.start("tiny.gguf", 0, 1000)
progress.advance(1000)
progress.close()
"""


def output_in_terminal(code: str) -> str:
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code], stderr=follower, stdout=subprocess.PIPE, check=True, env=environment)
    os.close(follower)
    output = b""
    with suppress(OSError), open(leader, "rb", buffering=0) as terminal:  # it ends with an error, on Linux
        while data := terminal.read(65536):
            output += data
    return output.decode()


def test_a_terminal_gets_a_bar() -> None:
    """Another attempt has the same one, and without a download nothing is drawn."""
    text = output_in_terminal(CODE.replace("start(", "start('tiny.gguf', 0, 1000); progress.start("))
    assert "[bold]a line[/bold]" in text
    assert "━━━" in text
    assert "1.0/1.0 kB" in text
    assert sum("tiny.gguf" in line for line in re.split(r"\x1b\[2K|\r", text.rpartition("a line")[2])[-3:]) == 1
    assert output_in_terminal("from server.parts.hub.download import Bar\nBar().close()") == ""


def test_a_file_gets_lines() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[0] == "[bold]a line[/bold]"
    assert done.stderr.splitlines()[1].startswith("Downloading tiny.gguf: 100 %, 1 kB of 1 kB, ")
    assert done.stdout == ""
