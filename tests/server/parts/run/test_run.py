"""`lightwell run`: its errors, its port, and what it reads of the server's log. tests/e2e/test_run.py has the rest."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.parts.run.commands import parse_record
from tests.support.serving import wait_until

COMMAND = [sys.executable, "-m", "server.cli.main", "run"]


def test_lines_of_the_log() -> None:
    for line, record in (
        (b'{"level":"info","message":"a","base_url":"u"}\n', {"level": "info", "message": "a", "base_url": "u"}),
        (b"lightwell: error: no model\n", {"level": "error", "message": "no model"}),
        (b"Downloading x\n", {"level": "info", "message": "Downloading x"}),
        (b"\xff\n", {"level": "info", "message": "\ufffd"}),
    ):
        assert parse_record(line) == record, line


def test_an_error_of_the_server_is_one_line() -> None:
    done = subprocess.run([*COMMAND, "nothing"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("lightwell: error: model 'nothing' is neither an existing file or folder")


@pytest.mark.long
def test_the_cause_is_named_and_not_its_consequence(smollm2_path: Path) -> None:
    command = [*COMMAND, str(smollm2_path), "--kv-cache-memory", "1000TiB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("lightwell: error: --kv-cache-memory")
    assert done.stderr.count("\n") == 1


@pytest.mark.long
def test_that_it_will_be_slow_is_said_before_the_chat(smollm2_path: Path, tmp_path: Path) -> None:
    """A compiler that does not exist leaves the plain torch kernels."""
    command = [*COMMAND, str(smollm2_path), "--port", "0", "--max-tokens", "1"]
    env = os.environ | {"LIGHTWELL_CACHE": str(tmp_path), "CXX": "/nowhere/c++"}
    done = subprocess.run(command, env=env, input="Hi\n", capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0
    assert done.stderr.startswith("lightwell: warning: using the slower plain torch kernels: the C++ compiler named by")


@pytest.mark.parametrize(
    ("signum", "status"),
    [
        (signal.SIGINT, 130),
        (signal.SIGKILL, -9),
        *(pytest.param(*case, marks=pytest.mark.long) for case in ((signal.SIGTERM, 143), (signal.SIGHUP, 129))),
    ],
)
def test_a_signal_while_the_server_starts(tmp_path: Path, signum: int, status: int) -> None:
    """The server ends with the command. A chat template that is a pipe keeps it from becoming ready."""
    pipe = tmp_path / "template"
    os.mkfifo(pipe)
    with subprocess.Popen([*COMMAND, "--chat-template", str(pipe), "--port", "0"], stderr=subprocess.PIPE) as process:
        wait_until(lambda: children(process.pid), timeout=60)
        (server,) = children(process.pid)
        wait_until(lambda: len(children(server)) == 2, timeout=60)
        family = [server, *children(server)]
        process.send_signal(signum)
        assert process.wait(60) == status
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in family))
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
