"""Concurrent streaming requests: their chunks, and how they ended."""

import json
import threading
from collections.abc import Iterable
from typing import Any

import httpx

from tests.support.clients import merge
from tests.support.server_process import COMPLETIONS, MODEL, ServerProcess
from tests.support.serving import check_envelope

JOIN_SECONDS = 300.0  # bounds hangs only


class Stream:
    """A streaming request in its own thread."""

    def __init__(self, server: ServerProcess, body: dict[str, Any], path: str = COMPLETIONS) -> None:
        self.chunks: list[dict[str, Any]] = []
        self.error: dict[str, Any] | None = None  # of an error event, or of a response that is not a stream
        self.status: int | None = None  # None: no response
        self.is_done = False  # [DONE] was received
        self.is_cut = False  # the connection was closed early
        self.ended = False
        self._http = server.http
        self._path = path
        self._body = {"model": MODEL, "stream": True} | body
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for_start(self) -> None:
        """Wait for the first chunk."""
        assert self._started.wait(JOIN_SECONDS)
        assert self.chunks, (self.status, self.error)

    def result(self) -> "Stream":
        """Wait for the end and return the stream itself."""
        self._thread.join(JOIN_SECONDS)
        assert not self._thread.is_alive()
        return self

    @property
    def is_complete(self) -> bool:
        """True if every choice has a finish reason and [DONE] came last."""
        reasons = [choice.finish_reason for choice in merge(self.chunks).values()]
        return self.is_done and not self.is_cut and self.error is None and bool(reasons) and None not in reasons

    @property
    def has_failed(self) -> bool:
        """True if the client can see the failure: an error event or a closed connection.

        A stream that merely ends without [DONE] would look like a success to most clients.
        """
        return self.is_cut or self.error is not None

    def _run(self) -> None:
        try:
            with self._http.stream("POST", self._path, json=self._body) as response:
                self.status = response.status_code
                if self.status == 200:
                    self._read(response.iter_lines())
                else:
                    self.error = check_envelope(response.read())
        except httpx.TransportError:
            self.is_cut = True
        finally:
            self.ended = True
            self._started.set()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            if not line or line.startswith(":"):
                continue
            assert not self.is_done
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                self.is_done = True
            elif "error" in json.loads(data):
                self.error = check_envelope(data.encode())
            else:
                self.chunks.append(json.loads(data))
                self._started.set()


def start_streams(server: ServerProcess, num_streams: int, **fields: Any) -> list[Stream]:
    """Start streams with different short prompts and wait for the first chunk of each."""
    prompts = [f"Once upon a time there were {number} cats, and" for number in range(num_streams)]
    streams = [Stream(server, {"prompt": prompt, "ignore_eos": True} | fields) for prompt in prompts]
    for stream in streams:
        stream.wait_for_start()
    return streams
