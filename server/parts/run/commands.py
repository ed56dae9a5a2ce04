"""`lightwell run`: starts a server, chats with it, and stops it at the end. Its flags are those of `serve` and a chat.

`python -m server.parts.run.commands` is that server: `lightwell serve` with its settings as JSON on standard input. It
ends with the thread that has started it.
"""

import argparse
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import msgspec

from engine.shared.launcher import die_with_parent, handling, leave
from server.cli.chat import add_conversation, chat
from server.cli.http_client import accepts_connections, local_url
from server.cli.parser import FAILURE, Commands, fail
from server.cli.serve import add_settings
from server.settings.load import load_settings
from server.settings.setting import SettingsError
from server.settings.table import SETTINGS, Settings

COMMAND = (sys.executable, "-P", "-m", "server.parts.run.commands")
STOP_SECONDS = 10.0
POLL_SECONDS = 0.1
CHAT_FLAGS = ("system", "temperature", "top_p", "max_completion_tokens")


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "run",
        help="serve a model and chat with it",
        usage="%(prog)s [MODEL] [FLAGS]",
        description="Serve a model, chat with it, and stop the server at the end. If another program has the default "
        "port, a free one is used. All flags of `lightwell serve` can be given.",
    )
    parser.set_defaults(run=_run)
    add_conversation(parser.add_argument_group("Chat"))
    add_settings(parser)


def _run(arguments: argparse.Namespace) -> int:
    settings = load_settings(vars(arguments), os.environ, arguments.config)
    is_default = settings.port == SETTINGS["port"].default and "port" not in vars(arguments)
    if is_default and accepts_connections(local_url(settings)):
        settings = msgspec.structs.replace(settings, port=0)
    chat_flags = {name: vars(arguments)[name] for name in CHAT_FLAGS}
    return run(settings, chat_flags)


class ServerError(Exception):
    """The server ended by itself. The message is its first error."""


class ServerProcess:
    """A server in the background, of which only warnings and errors are shown. It ends with this process.

    It has its own process group, so that Ctrl-C, which stops an answer of the chat, does not reach it.
    """

    def __init__(self, settings: Settings) -> None:
        self.last_message = ""
        self.errors: list[str] = []  # messages; the first is the cause of those after it
        self.warnings: list[str] = []
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:
            # Records of level info tell how far it is.
            stdin.write(msgspec.json.encode(msgspec.structs.replace(settings, log_format="json", log_level="info")))
        self._ready: queue.Queue[str | None] = queue.Queue()  # the base URL; None at the end of the log
        threading.Thread(target=self._read_log, name="log of the server", daemon=True).start()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            record = parse_record(line)
            self.last_message = str(record.get("message", ""))
            if record.get("level") == "error":
                self.errors.append(self.last_message)
            if record.get("level") == "warning":
                self.warnings.append(self.last_message)
            if "base_url" in record:
                self._ready.put(str(record["base_url"]))
        self._ready.put(None)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def error(self) -> ServerError:
        return ServerError(self.errors[0] if self.errors else self.last_message or "the server ended")

    def wait_until_ready(self) -> str:
        """Return the server's URL, showing its progress in a terminal. Raises ServerError if it ends instead."""
        from rich.console import Console
        from rich.text import Text

        started = time.monotonic()
        with Console(stderr=True, highlight=False).status("Starting the server") as status:
            while True:
                with suppress(queue.Empty):
                    if (base_url := self._ready.get(timeout=POLL_SECONDS)) is None:
                        raise self.error()
                    return base_url.removesuffix("/v1")
                text = f"Starting the server, {time.monotonic() - started:.0f} s. {self.last_message}"
                status.update(Text(text, no_wrap=True, overflow="ellipsis"))

    def stop(self) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._process.kill()


def parse_record(line: bytes) -> dict[str, Any]:
    """Return a record of the log. A line that is none, such as an error before the log begins, is made one."""
    with suppress(ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return msgspec.json.decode(line, type=dict[str, Any])
    text = line.decode(errors="replace").strip()
    message = text.removeprefix("lightwell: error: ")
    return {"level": "info" if message == text else "error", "message": message}


def run(settings: Settings, chat_flags: dict[str, Any]) -> int:
    """Serve and chat. Return the exit status of the chat. Raises CommandError."""
    with handling((signal.SIGTERM, signal.SIGHUP), leave):  # so that the server is stopped in order
        server = ServerProcess(settings)
        try:
            url = server.wait_until_ready()
            for message in server.warnings:
                print(f"lightwell: warning: {message}", file=sys.stderr, flush=True)
            status = chat(url=url, api_key=next(iter(settings.api_key), None), **chat_flags)
            if server.has_ended:
                raise server.error()
            return status
        except ServerError as error:
            return fail(str(error))
        finally:
            server.stop()


def main() -> int:
    """Serve with the settings on standard input, as `lightwell serve` does. Return the exit status."""
    from server.model_paths import ModelError
    from server.processes.child_process import SupervisorError
    from server.supervisor import supervise

    die_with_parent(os.getppid())
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)
    try:
        return supervise(settings)
    except (ModelError, SettingsError, SupervisorError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return FAILURE


if __name__ == "__main__":
    sys.exit(main())
