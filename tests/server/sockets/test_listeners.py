"""UNIX sockets: who may connect, stale files, removal. tests/server/test_main.py has tests of ports."""

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from server.sockets.listeners import bind_unix, listening, url


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A path that is short, as those of sockets must be."""
    monkeypatch.chdir(tmp_path)
    return "lw.sock"


def test_user_and_group_may_connect_and_the_file_is_removed(path: str) -> None:
    with listening("127.0.0.1", 0, path) as (listener,):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        assert url(listener) == "unix:lw.sock"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    listener.close()
    assert not os.path.exists(path)


def test_a_stale_file_is_replaced(path: str) -> None:
    bind_unix(path).close()  # as after SIGKILL
    assert os.path.exists(path)
    with listening("127.0.0.1", 0, path) as (listener,), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        listener.close()


def test_the_file_of_another_server_stays(path: str) -> None:
    with listening("127.0.0.1", 0, path) as (first,):
        with pytest.raises(OSError, match=r"--uds lw\.sock: another server listens on it"):
            bind_unix(path)
        os.unlink(path)
        second = bind_unix(path)
        first.close()
    assert os.path.exists(path)
    second.close()


@pytest.mark.parametrize("command", ["touch", "mkdir"])
def test_other_files_are_not_replaced(path: str, command: str) -> None:
    subprocess.run([command, path], check=True)
    with pytest.raises(OSError, match=r"--uds lw\.sock: there is a file that is no socket"):
        bind_unix(path)


@pytest.mark.parametrize(("bad", "reason"), [("no/lw.sock", "No such file or directory"), ("x" * 200, "too long")])
def test_the_reason_is_named(path: str, bad: str, reason: str) -> None:
    with pytest.raises(OSError, match=f"--uds {bad}: .*{reason}"):
        bind_unix(bad)
