"""A small OpenAI-compatible server for tests of its clients (`lightwell chat` and `bench`)."""

import asyncio
import dataclasses
import json
import threading
from typing import Any, Self


@dataclasses.dataclass
class Script:
    """The answers of the stub: their chunks and failures."""

    chunks: list[list[str]] = dataclasses.field(default_factory=lambda: [["Hel"], ["lo"]])  # tokens of each chunk
    hold: int = 0  # no answer begins before so many requests have run at a time
    num_prompt_tokens: int = 5
    with_usage: bool = True
    with_token_ids: bool = False
    status: int = 200
    finish_reason: str | None = None  # sent in a chunk of its own, without text
    error: str | None = None  # error message, in the body if status is not 200, else as an event after the chunks
    with_done: bool = True
    is_chunked: bool = True
    close_early: bool = False  # close the connection in the middle of the answer
    never_ends: bool = False


@dataclasses.dataclass(frozen=True)
class SeenRequest:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class StubServer:
    """The stub server. It runs in its own thread while the context is open."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.seen: list[SeenRequest] = []
        self.num_running = self.max_running = 0
        self.disconnected = threading.Event()
        self._has_begun = asyncio.Event()

    @property
    def requests(self) -> list[SeenRequest]:
        return [seen for seen in self.seen if seen.method == "POST"]

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        await asyncio.sleep(0.01)  # asyncio leaves a connection open that it accepts in the moment of `close`
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.01)  # for transports to close their sockets

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(await _read_request(reader), reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.disconnected.set()
        finally:
            writer.close()

    async def _answer(self, seen: SeenRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen.append(seen)
        if seen.path == "/v1/models":
            return _write_json(writer, 200, {"object": "list", "data": [{"id": "stub-model"}]})
        if self.script.status != 200:
            error = {"message": self.script.error or "no", "type": "t", "param": None, "code": None}
            return _write_json(writer, self.script.status, {"error": error})
        return await self._stream(seen, reader, writer)

    async def _stream(self, seen: SeenRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = self.script
        encoding = "transfer-encoding: chunked\r\n" if script.is_chunked else ""
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{encoding}\r\n".encode())
        self._write(writer, b": keep-alive\r\n\r\n")
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        if self.max_running >= script.hold:
            self._has_begun.set()
        await self._has_begun.wait()
        for tokens in script.chunks:
            self._event(writer, _chunk(seen.path, tokens, script.with_token_ids))
            await writer.drain()
        if script.never_ends:
            await reader.readexactly(1)  # raises when the client disconnects
        self.num_running -= 1
        if script.close_early:
            return
        if script.finish_reason:
            self._event(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": script.finish_reason}]})
        if script.error:
            self._event(writer, {"error": {"message": script.error, "type": "t", "param": None, "code": None}})
        if script.with_usage:
            usage = {"prompt_tokens": script.num_prompt_tokens, "completion_tokens": sum(map(len, script.chunks))}
            self._event(writer, {"choices": [], "usage": usage})
        if script.with_done:
            self._write(writer, b"data: [DONE]\n\n")
        if script.is_chunked:
            writer.write(b"0\r\n\r\n")
        await writer.drain()

    def _event(self, writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
        self._write(writer, b"data: " + json.dumps(data).encode() + b"\r\n\r\n")

    def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data) if self.script.is_chunked else data)


async def _read_request(reader: asyncio.StreamReader) -> SeenRequest:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    method, path, _ = head[0].split()
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return SeenRequest(method, path, headers, json.loads(body) if body else None)


def _chunk(path: str, tokens: list[str], with_token_ids: bool) -> dict[str, Any]:
    text = "".join(tokens)
    choice = {"index": 0, "delta": {"content": text}} if "chat" in path else {"index": 0, "text": text}
    return {"choices": [choice | ({"token_ids": [1] * len(tokens)} if with_token_ids else {})]}


def _write_json(writer: asyncio.StreamWriter, status: int, content: object) -> None:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
