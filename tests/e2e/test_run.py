"""`lightwell run` at a terminal, with a real model: from the start to the end, nothing is left."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.server.cli.test_chat import Terminal
from tests.support.server_process import READY_SECONDS
from tests.support.serving import wait_until

PROMPT = r"\r\n> $"


@pytest.fixture
def terminal(smollm2_path: Path, tmp_path: Path) -> Iterator[Terminal]:
    """`lightwell run` on a free port, at its first prompt."""
    command = [sys.executable, "-m", "server.cli.main", "run", str(smollm2_path), "--port", "0", "--log-level=error"]
    command += ["--on-engine-death=exit", "--temperature", "0", "--max-tokens", "400"]
    terminal = Terminal(command, XDG_RUNTIME_DIR=str(tmp_path))
    terminal.read_until(PROMPT, READY_SECONDS)
    yield terminal
    terminal.close()


def test_a_chat_and_its_server(terminal: Terminal, tmp_path: Path) -> None:
    family = psutil.Process(terminal.process.pid).children(recursive=True)
    assert len(family) == 4  # supervisor, engine process, API process, chat template
    terminal.type("Count from one to a hundred in words.\n")
    terminal.read_until(r"words\.\r\n(?s:.{20})", READY_SECONDS)
    terminal.type("\x03")
    terminal.read_until(rf"\(stopped\){PROMPT}", READY_SECONDS)
    assert all(process.is_running() for process in family)  # Ctrl-C stopped the answer only
    (file,) = (tmp_path / "lightwell").iterdir()
    url = re.search(r"http://[\d.:]+", file.read_text())
    assert url is not None
    chat = [sys.executable, "-m", "server.cli.main", "chat", "--max-tokens", "3", "--url", url[0]]
    done = subprocess.run(chat, input="Hi\n", capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip()
    terminal.type("/exit\n")
    assert terminal.end() == 0
    assert [process for process in family if process.is_running()] == []
    assert list((tmp_path / "lightwell").iterdir()) == []


@pytest.mark.long
def test_a_server_that_dies(terminal: Terminal) -> None:
    (supervisor,) = psutil.Process(terminal.process.pid).children()
    (engine,) = (each for each in supervisor.children() if "engine.process" in each.cmdline())
    engine.send_signal(signal.SIGKILL)
    wait_until(lambda: not supervisor.is_running() or supervisor.status() == psutil.STATUS_ZOMBIE)
    terminal.type("Hi\n")
    terminal.read_until(rf"lightwell: error: no server answers.*{PROMPT}", READY_SECONDS)
    terminal.type("\x04")
    terminal.read_until("lightwell: error: the engine died: its process has ended", READY_SECONDS)
    assert terminal.end() == 1
