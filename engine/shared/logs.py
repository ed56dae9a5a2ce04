"""Logs for people or for machines, on standard error, from a thread that may block where the server must not.

Records never hold prompts, outputs or keys; what a client chose (a path, say) cannot break out of its line.
"""

import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
import traceback
from collections.abc import Callable
from logging.handlers import QueueHandler

MAX_WAITING_RECORDS = 10_000
FLUSH_SECONDS = 1.0
STDERR_FD = 2

# Loggers that would print what clients send or receive at level debug.
TALKATIVE = ("sse_starlette", "httpx", "httpcore", "asyncio", "uvicorn")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def configure_logging(level: str, log_format: str, fd: int = STDERR_FD) -> Callable[[], None]:
    """Sends all logs of this process to `fd`. Returns what writes the rest out, for the end of the process.

    `log_format` is "human" or "json".
    """
    formatter = JSONFormatter() if log_format == "json" else HumanFormatter()
    writer = _Writer(fd)
    handler = _DroppingQueueHandler(writer.records)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    return writer.close


class HumanFormatter(logging.Formatter):
    """`12:30:01 INFO  server.api: message`; extra fields follow as `key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extra = "".join(f" {key}={value}" for key, value in extra_fields(record).items())
        line = f"{clock} {record.levelname:<7} {record.name}: {record.getMessage()}{extra}"
        return escape(line) + _indent(_traceback(record))


class JSONFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **extra_fields(record),
        }
        if text := _traceback(record):
            fields["traceback"] = text
        return json.dumps(fields, default=str)


def extra_fields(record: logging.LogRecord) -> dict[str, object]:
    """What was passed as `extra={"fields": ...}` or as `extra={"request_id": ...}`."""
    fields: dict[str, object] = dict(getattr(record, "fields", {}))
    if request_id := getattr(record, "request_id", None):
        fields["request_id"] = request_id
    return fields


def escape(text: str) -> str:
    """Control characters as escapes, so that a line stays one line and a terminal obeys nobody."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _traceback(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    return "".join(traceback.format_exception(*record.exc_info)).rstrip()


def _indent(text: str) -> str:
    """Lines of a traceback, each marked, so that none can pass for a record."""
    return "".join("\n  | " + escape(line) for line in text.splitlines())


class _DroppingQueueHandler(QueueHandler):
    """Formats at once, and drops a record rather than wait for a reader that does not read."""

    def prepare(self, record: logging.LogRecord) -> str:
        return self.format(record)

    def enqueue(self, record: object) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


class _Writer:
    """Writes lines to a file descriptor in a thread of its own. Errors (a full disk) are ignored: we serve on."""

    def __init__(self, fd: int) -> None:
        self.records: queue.Queue[str | None] = queue.Queue(MAX_WAITING_RECORDS)
        self._fd = fd
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Waits a moment for what has not been written."""
        try:
            self.records.put(None, timeout=FLUSH_SECONDS)
        except queue.Full:
            return
        self._thread.join(FLUSH_SECONDS)

    def _run(self) -> None:
        while (line := self.records.get()) is not None:
            data = line.encode("utf-8", "backslashreplace") + b"\n"
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:
                continue
