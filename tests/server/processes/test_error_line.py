"""Errors of the supervisor are printed where that is possible."""

import os
import subprocess
import sys

import msgspec

CODE = "from server.processes.error_line import print_error; print_error({!r}, logger='a', log_format={!r})"


def test_a_line() -> None:
    text, record = (
        subprocess.run([sys.executable, "-c", CODE.format("é\n", form)], capture_output=True, check=True).stderr
        for form in ("human", "json")
    )
    assert text.decode() == "lightwell: error: é\n\n"
    assert msgspec.json.decode(record).items() >= {"level": "error", "logger": "a", "message": "é\n"}.items()


def test_a_full_disk_and_a_reader_that_has_gone_are_no_errors() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for fd in (writer, full):
        assert subprocess.run([sys.executable, "-c", CODE.format("a", "human")], stderr=fd, check=False).returncode == 0
        os.close(fd)
