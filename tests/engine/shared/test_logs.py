"""Log lines as text and as JSON. A log that cannot be written does not block the process."""

import json
import logging
import os
import re
import threading
from collections.abc import Iterator

import pytest

from engine.shared import logs
from engine.shared.logs import MAX_WAITING_RECORDS, HumanFormatter, JSONFormatter, configure_logging, escape

logger = logging.getLogger("tests.logs")


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """Restore what `configure_logging` changes."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("server.x", logging.INFO, "x.py", 1, message, args, None)
    made.__dict__.update(extra)
    return made


def test_a_value_is_one_word() -> None:
    fields = {"a": "x b=1", "c": 'say "hi"', "d": "fe80::1%e\u2003f=2", "e": None, "g": 1.5}
    line = HumanFormatter().format(record("%s done", "it", fields=fields, request_id="r1"))
    end = 'a="x b=1" c="say \\"hi\\"" d="fe80::1%e\u2003f=2" e=None g=1.5 request_id=r1'
    assert line.endswith(f" INFO    server.x: it done {end}")


def test_json_line() -> None:
    made = record("%s done", "it", fields={"status": 200})
    line = json.loads(JSONFormatter().format(made))
    assert line.pop("time") == pytest.approx(made.created, abs=0.001)
    assert line == {"level": "info", "logger": "server.x", "message": "it done", "status": 200}


def test_details_are_lines_of_their_own_or_fields() -> None:
    made = record("ready", fields={"a": 1}, details={"curl": "curl x", "nasty": "a\n12:00:00 INFO"})
    first, *rest = HumanFormatter().format(made).splitlines()
    assert first.endswith("ready a=1")
    assert rest == ["    curl: curl x", "    nasty: a\\x0a12:00:00 INFO"]
    line = json.loads(JSONFormatter().format(made))
    assert (line["a"], line["curl"]) == (1, "curl x")


NASTY = "a\nb\r\x1b[31m\x00\x7f\x9b\u2028 ü\ud800"


@pytest.mark.checklist("A15")
@pytest.mark.parametrize("formatter", [HumanFormatter(), JSONFormatter()])
def test_a_line_stays_one_line(formatter: logging.Formatter) -> None:
    line = formatter.format(record("%s", NASTY, fields={"path": NASTY}))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert escape("ü 世界") == "ü 世界"


@pytest.mark.parametrize("formatter", [HumanFormatter(), JSONFormatter()])
def test_tracebacks_cannot_be_mistaken_for_records(formatter: logging.Formatter) -> None:
    made = record("failed")
    try:
        raise ValueError("x\n12:00:00 INFO server: all is well\x1b[0m")
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    first, *rest = formatter.format(made).splitlines()
    assert "failed" in first
    assert all(line.startswith("  | ") for line in rest)
    assert "\x1b" not in "".join(rest)


def read_all(fd: int) -> str:
    data = b""
    while chunk := os.read(fd, 65536):
        data += chunk
    return data.decode()


def test_lines_are_written_in_order(root_logger: logging.Logger) -> None:
    reader, writer = os.pipe()
    close = configure_logging("info", "json", writer)
    for number in range(100):
        logger.info("line %d", number)
    logger.debug("too much")
    close()
    os.close(writer)
    messages = [json.loads(line)["message"] for line in read_all(reader).splitlines()]
    os.close(reader)
    assert messages == [f"line {number}" for number in range(100)]


def test_closing_waits_until_the_lines_are_written(root_logger: logging.Logger) -> None:
    reader, writer = os.pipe()
    close = configure_logging("info", "json", writer)
    logger.info("x" * 1_000_000)  # more than a pipe holds: the writer waits for the reader
    closing = threading.Thread(target=close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    with os.fdopen(reader) as lines:
        assert len(json.loads(lines.readline())["message"]) == 1_000_000
        closing.join()
    os.close(writer)


def test_a_line_replaces_a_progress_bar_in_a_terminal(root_logger: logging.Logger) -> None:
    terminal, fd = os.openpty()
    os.write(fd, b"weights 10 %")  # by this process or another
    close = configure_logging("info", "human", fd)
    logger.info("loaded")
    close()
    shown = b""
    while not shown.endswith(b"\n"):  # a terminal hands over in parts what was written
        shown += os.read(terminal, 1000)
    assert re.fullmatch(rb"weights 10 %\r\x1b\[K[\d:]{8} INFO +tests.logs: loaded\r\n", shown)
    os.close(fd)
    os.close(terminal)


@pytest.mark.checklist("G07")
def test_a_log_that_is_not_read_does_not_block(root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 0.01)
    reader, writer = os.pipe()
    close = configure_logging("info", "human", writer)
    for _ in range(MAX_WAITING_RECORDS + 2000):
        logger.info("x" * 100)
    close()
    os.close(reader)  # the writer's thread gets an error and continues


@pytest.mark.checklist("G07")
def test_a_full_disk_is_ignored(root_logger: logging.Logger) -> None:
    close = configure_logging("debug", "human", os.open("/dev/full", os.O_WRONLY))
    logger.info("lost")
    close()
    for name in ("httpx", "httpcore.http11", "uvicorn.error"):
        assert not logging.getLogger(name).isEnabledFor(logging.INFO), "verbose loggers do not log requests"
