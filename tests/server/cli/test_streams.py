"""Standard streams that are full, closed or no text end a command in one line."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli import chat
from server.cli.chat import input_lines
from server.cli.parser import CommandError

COMMAND = f"{sys.executable} -m server.cli.main"
FULL = "lightwell: error: No space left on device\n"


def shell(command: str) -> tuple[int, str]:
    """Run a command line; return its status and what it writes to standard error."""
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", ["--help", "serve --help"])
def test_output_that_cannot_be_written(arguments: str) -> None:
    assert shell(f"PYTHONUNBUFFERED= {COMMAND} {arguments} >/dev/full") == (1, FULL)


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    """A reader that has ended needs no message; the status tells scripts that something is missing."""
    pipe = f"mkfifo {tmp_path}/pipe; exec 3<>{tmp_path}/pipe 4>{tmp_path}/pipe 3>&-; exec {COMMAND} --help >&4 4>&-"
    assert shell(pipe) == (1, "")


def test_errors_that_cannot_be_written_keep_their_status() -> None:
    assert shell(f"{COMMAND} serve --prot 2>/dev/full") == (2, "")


def lines_of(data: bytes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
    return list(input_lines())


def test_lines_of_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(b"One\r\n\n\xc3\xa9", monkeypatch) == ["One\r\n", "\n", "é"]


def test_a_line_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_LINE_BYTES", 8)
    assert lines_of(b"12345678", monkeypatch) == ["12345678"]
    with pytest.raises(CommandError, match=r"^standard input: line 1 is longer than 8 bytes$"):
        lines_of(b"123456789", monkeypatch)


def test_input_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out").open("wb") as out:
        reader = open(out.fileno(), closefd=False, encoding="utf-8")  # noqa: SIM115
        monkeypatch.setattr(sys, "stdin", reader)
        with pytest.raises(CommandError, match=r"^standard input cannot be read: Bad file descriptor$"):
            next(input_lines())


def test_standard_streams_that_are_closed_get_the_null_device() -> None:
    code = (
        "import os, subprocess, sys; from server.cli.main import open_standard_streams; open_standard_streams();"
        "print('lost', file=sys.stderr); print('lost');"
        "same = [os.path.samestat(os.fstat(fd), os.stat(os.devnull)) for fd in (0, 1, 2)];"
        "child = subprocess.run([sys.executable, '-c', 'import sys; sys.exit(sys.stderr is None)']);"
        "sys.exit(0 if all(same) and child.returncode == 0 and min(os.pipe()) > 2 else 7)"
    )
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(shell, check=False).returncode == 0
