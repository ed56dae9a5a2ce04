"""The files by which `lightwell chat` finds servers."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from server.running_servers import RunningServer, folder, registered, registered_servers

ONE, TWO = (RunningServer(url=f"http://127.0.0.1:{port}", model="m") for port in (1, 2))


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "lightwell"


def test_a_server_is_found_while_it_is_registered(runtime_folder: Path) -> None:
    assert registered_servers() == []
    with registered(ONE):
        assert registered_servers() == [ONE]
        assert runtime_folder.stat().st_mode & 0o777 == 0o700
    assert registered_servers() == []


def test_the_last_one_is_first_and_files_of_ended_processes_are_removed(runtime_folder: Path) -> None:
    with registered(ONE), subprocess.Popen(["sleep", "60"]) as other:
        later = time.time() + 10
        (file := runtime_folder / f"{other.pid}.json").write_text('{"url": "http://127.0.0.1:2", "model": "m"}')
        os.utime(file, (later, later))
        assert registered_servers() == [TWO, ONE]
        other.kill()
        other.wait()
        assert registered_servers() == [ONE]
        assert not file.exists()


def test_files_that_cannot_be_used_are_ignored(runtime_folder: Path) -> None:
    with registered(ONE):
        file = runtime_folder / f"{os.getppid()}.json"
        for content in (b"", b"{", b"{}", b"[1]", b"\0", b"\xff", b'{"a": ' + 100_000 * b"["):
            file.write_bytes(content)
            assert registered_servers() == [ONE]
        if os.getuid() == 0:
            file.write_text('{"url": "http://127.0.0.1:2", "model": "m"}')
            assert TWO in registered_servers()
            os.chown(file, 12345, -1)  # of another user
            assert registered_servers() == [ONE]


def test_without_a_folder_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    with registered(ONE):
        assert registered_servers() == []


def test_the_folder_is_in_the_cache_where_there_is_no_runtime_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("LIGHTWELL_CACHE", str(tmp_path))
    assert folder() == tmp_path / "servers"
