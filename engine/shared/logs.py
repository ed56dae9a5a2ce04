"""Logging to standard error, as text or JSON. A thread writes the lines, so that a slow reader never blocks the server.

Records never contain prompts, outputs or keys. Control characters are escaped, so that text from clients (a path, say)
cannot forge a line.
"""

import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from logging.handlers import QueueHandler

MAX_WAITING_RECORDS = 10_000
FLUSH_SECONDS = 1.0
STDERR_FD = 2
CLEAR_LINE = b"\r\x1b[K"  # of a progress bar, which this process or another may show and will draw again below

# Loggers that log at level debug what clients send or receive.
VERBOSE_LOGGERS = ("httpx", "httpcore", "asyncio", "uvicorn", "sse_starlette")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ENDS_WORD = re.compile(r'[\s="]')


def configure_logging(level: str, log_format: str, fd: int = STDERR_FD, label: str = "") -> Callable[[], None]:
    """Send all logs of this process to `fd`, formatted as "human" or "json".

    `label` is added to the names of loggers, to tell apart processes that run the same code.

    Return a function that writes the remaining records; call it at the end of the process.
    """
    formatter = JSONFormatter() if log_format == "json" else HumanFormatter()
    writer = _Writer(fd)
    handler = _DroppingQueueHandler(writer.records)
    handler.setFormatter(formatter)
    if label:
        handler.addFilter(partial(_add_label, label))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    return writer.close


def _add_label(label: str, record: logging.LogRecord) -> bool:
    """Append the label to the name of the logger, and keep the record: a filter."""
    record.name += label
    return True


class HumanFormatter(logging.Formatter):
    """`12:30:01 INFO  server.api: message`; extra fields follow as `key=value`, details in lines of their own.

    A value is a JSON string if it has what ends a field, so that text from clients cannot forge another.
    """

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extra = "".join(f" {key}={_one_word(value)}" for key, value in extra_fields(record).items())
        line = f"{clock} {record.levelname:<7} {record.name}: {record.getMessage()}{extra}"
        text = escape(line)
        if hasattr(record, "details"):
            text += _detail_lines(record)
        if record.exc_info and record.exc_info[0]:
            text += _indent(self.formatException(record.exc_info))
        return text


class JSONFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **extra_fields(record),
            **details(record),
        }
        if record.exc_info and record.exc_info[0]:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def extra_fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the fields that were passed as `extra={"fields": ...}` or `extra={"request_id": ...}`."""
    fields: dict[str, object] = dict(getattr(record, "fields", {}))
    if request_id := getattr(record, "request_id", None):
        fields["request_id"] = request_id
    return fields


def details(record: logging.LogRecord) -> dict[str, object]:
    """Return the fields that were passed as `extra={"details": ...}`: long ones, to be read or copied."""
    return dict(getattr(record, "details", {}))


def escape(text: str) -> str:
    """Replace control characters by escapes, so that text cannot start a new line or control a terminal."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _one_word(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if _ENDS_WORD.search(text) else text


def _detail_lines(record: logging.LogRecord) -> str:
    return "".join("\n    " + escape(f"{name}: {value}") for name, value in details(record).items())


def _indent(text: str) -> str:
    """Mark each line of a traceback, so that none can be mistaken for a record."""
    return "".join("\n  | " + escape(line) for line in text.splitlines())


class _DroppingQueueHandler(QueueHandler):
    """Formats records in the calling thread, and drops them when the queue is full."""

    def prepare(self, record: logging.LogRecord) -> str:
        return self.format(record)

    def enqueue(self, record: object) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


class _Writer:
    """Writes lines to a file descriptor in its own thread. Write errors (a full disk, say) are ignored."""

    def __init__(self, fd: int) -> None:
        self._start_of_line = CLEAR_LINE if os.isatty(fd) else b""
        self.records: queue.Queue[str | None] = queue.Queue(MAX_WAITING_RECORDS)
        self._fd = fd
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the queued lines, waiting for at most twice `FLUSH_SECONDS`."""
        try:
            self.records.put(None, timeout=FLUSH_SECONDS)
        except queue.Full:
            return
        self._thread.join(FLUSH_SECONDS)

    def _run(self) -> None:
        while (line := self.records.get()) is not None:
            data = self._start_of_line + line.encode("utf-8", "backslashreplace") + b"\n"
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:
                continue
