"""UNIX sockets: who may connect, stale files, and the folders that have them. test_main.py has tests of ports."""

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from server.sockets import LONGEST_NAME, MAX_PATH_BYTES, PREFIX, SocketFolder, bind_unix, listening, url


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


# Folders: private, with short paths, removed with their process or by the next one.

KILLED = """
import os, signal
from server.sockets import SocketFolder
folder = SocketFolder()
(folder.path / "engine-0.sock").touch()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, whose path is short."""
    with tempfile.TemporaryDirectory(prefix="lw-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_it_is_private_and_removed_at_the_end(parent: Path) -> None:
    with closing(SocketFolder()) as folder:
        assert folder.path.parent == parent
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        (folder.path / "engine-0.sock").touch()
    assert not folder.path.exists()


def test_paths_of_sockets_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (long := tmp_path / ("x" * 90)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with closing(SocketFolder()) as folder:
        assert folder.path.is_dir()
        assert len(os.fsencode(folder.path / LONGEST_NAME)) <= MAX_PATH_BYTES


def test_the_next_process_removes_those_of_killed_ones_alone(parent: Path) -> None:
    others = [parent / f"{PREFIX}file", parent / "lightwell-other", parent / f"{PREFIX}link"]
    others[0].touch()
    others[1].mkdir()
    others[2].symlink_to(others[1])
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED], check=False).returncode == -signal.SIGKILL
        (left,) = set(parent.iterdir()) - set(others)
        assert [path.name for path in left.iterdir()] == ["engine-0.sock"]
    with closing(SocketFolder()) as first, closing(SocketFolder()) as second:
        assert set(parent.iterdir()) == {first.path, second.path, *others}
    assert set(parent.iterdir()) == set(others)


def test_one_that_is_removed_before_it_is_locked_is_made_again(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    make, lock = tempfile.mkdtemp, fcntl.flock

    def mkdtemp(**options: str) -> str:
        made.append(Path(make(**options)))
        if len(made) == 1:
            made[0].rmdir()
        return str(made[-1])

    def flock(descriptor: int, operation: int) -> None:
        if len(made) == 2:
            made[1].rmdir()
        lock(descriptor, operation)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(fcntl, "flock", flock)
    with closing(SocketFolder()) as folder:
        assert folder.path == made[2]
        assert folder.path.is_dir()
