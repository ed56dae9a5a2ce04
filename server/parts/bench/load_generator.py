"""Send many concurrent requests to an OpenAI-compatible server, and time the chunks of each answer.

It uses plain asyncio streams and a minimal HTTP client, so that the load generator takes little CPU time from a server
on the same machine.
"""

import asyncio
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from urllib.parse import urlsplit

import msgspec

from server.cli.http_client import RemoteError, StreamUsage, decode_chunk, one_line, tls_context

_WORDS = (
    "able above across after again air all along animal answer apple arm ask autumn away back bag ball bank base bed "
    "begin bell best big bird black blue boat body book both box boy bread bridge bring brother build bus busy call "
    "camp car card care carry cat cause chair change city class clean clear clock close cloud coat cold color come "
    "cook corn corner count cover cow cross cup cut dance dark day deep desk dinner dog door down draw dream dress "
    "drink drive dry each early earth east easy edge egg end evening face fact fall farm fast field fill find fire "
    "first fish floor flower fly food foot forest form free fresh friend front fruit full game garden gift girl give "
    "glass gold good grass great green ground group grow half hand happy hard hat head hear heart heavy help high hill"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The server to send requests to, their number and pace, and their contents."""

    url: str
    api_key: str | None = None
    model: str | None = None  # None: the first model that the server lists
    endpoint: str = "completions"  # completions, chat
    num_requests: int = 64
    concurrency: int = 8
    rate: float | None = None  # requests per second; None: closed loop
    input_len: int = 128  # words, about one token each
    output_len: int = 64  # tokens
    shared_prefix_len: int = 0  # words that all prompts start with
    temperature: float = 0.0
    ignore_eos: bool = True  # request exactly output_len tokens
    warmup: int = 0  # requests before the measured ones
    timeout: float = 600.0  # seconds for one request
    seed: int = 0


@dataclasses.dataclass
class Exchange:
    """One request and its answer as the client saw it. Times are those of `time.perf_counter()`."""

    start: float
    end: float = 0.0
    chunks: list[tuple[float, int | None]] = dataclasses.field(default_factory=list)  # time, number of tokens if known
    usage: StreamUsage | None = None
    error: str | None = None

    @property
    def num_output_tokens(self) -> int:
        """Number of output tokens reported by the server, or counted from the chunks if it reports none."""
        return self.usage.completion_tokens if self.usage else sum(count or 1 for _, count in self.chunks)

    def inter_token_latencies(self) -> list[float]:
        """Return the seconds between tokens. The k tokens of a chunk are spread evenly since the previous chunk.

        If chunks do not tell their number of tokens, the tokens that the server counted are shared equally among them.
        """
        share = self.num_output_tokens / max(1, len(self.chunks))
        latencies = []
        for (before, _), (now, count) in pairwise(self.chunks):
            num_tokens = count or share or 1
            latencies += [(now - before) / num_tokens] * max(1, round(num_tokens))
        return latencies


def make_prompts(load: LoadOptions, seed: int, num_prompts: int) -> list[str]:
    """Return prompts of random words, which depend on the seed alone."""
    rng, words = random.Random(seed), _WORDS.split()
    prefix = rng.choices(words, k=min(load.shared_prefix_len, load.input_len))
    num_own = load.input_len - len(prefix)
    return [" ".join(prefix + rng.choices(words, k=num_own)) for _ in range(num_prompts)]


class Target:
    """The server under load: opens connections to it, sends requests and reads answers."""

    def __init__(self, load: LoadOptions, model: str) -> None:
        """Raises RemoteError if the authorities to trust cannot be read."""
        self._load = load
        url = urlsplit(load.url)
        assert url.hostname is not None
        self._host = url.hostname
        self._ssl = tls_context() if url.scheme == "https" else None
        self._port = url.port or (443 if self._ssl else 80)
        is_chat = load.endpoint == "chat"
        path = f"{url.path}/v1/{'chat/completions' if is_chat else 'completions'}"
        key = f"Authorization: Bearer {load.api_key}\r\n" if load.api_key else ""
        self._head = f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\n{key}Content-Type: application/json\r\n"
        self._fields = {
            "model": model,
            "max_tokens": load.output_len,
            "temperature": load.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if load.ignore_eos:
            self._fields |= {"ignore_eos": True, "min_tokens": load.output_len}

    def request(self, prompt: str) -> bytes:
        is_chat = self._load.endpoint == "chat"
        fields = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
        body = msgspec.json.encode(self._fields | fields)
        return f"{self._head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port, ssl=self._ssl, limit=1 << 20)

    async def exchange(self, prompt: str, start: float) -> Exchange:
        """Send one request, which was due at `start`, and read its answer. Failures are recorded, not raised."""
        exchange = Exchange(start)
        try:
            async with asyncio.timeout(self._load.timeout):
                await self._exchange(self.request(prompt), exchange)
        except TimeoutError:
            exchange.error = "timeout"
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            exchange.error = "connection broken"
        except RemoteError as error:
            exchange.error = str(error)
        exchange.end = time.perf_counter()
        return exchange

    async def _exchange(self, request: bytes, exchange: Exchange) -> None:
        reader, writer = await self.connect()
        try:
            writer.write(request)
            await writer.drain()
            await self._read(reader, exchange)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader, exchange: Exchange) -> None:
        status, is_chunked = await _read_head(reader)
        body = _chunked(reader) if is_chunked else _plain(reader)
        if status != 200:
            raise RemoteError(f"HTTP {status}: {_error_message(b''.join([piece async for piece in body]))}")
        async for line in _lines(body):
            data = line[5:].strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                _record_chunk(exchange, data)
        raise RemoteError("stream cut off")


def _record_chunk(exchange: Exchange, data: bytes) -> None:
    chunk = decode_chunk(data)
    if chunk.usage:
        exchange.usage = chunk.usage
    if chunk.text:
        token_ids = chunk.choices[0].token_ids
        exchange.chunks.append((time.perf_counter(), len(token_ids) if token_ids else None))


# A minimal HTTP/1.1 client.


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Return the status, and whether the body is chunked. Raises ValueError if the answer is not HTTP."""
    lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    _, status, *_ = lines[0].split()
    return int(status), any(b"chunked" in line for line in lines if line.startswith(b"transfer-encoding:"))


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while num_bytes := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(num_bytes)
        await reader.readexactly(2)


async def _plain(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(1 << 16):
        yield piece


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line


def _error_message(body: bytes) -> str:
    with suppress(ValueError, TypeError, KeyError, RecursionError):  # msgspec's errors are ValueErrors
        return one_line(msgspec.json.decode(body)["error"]["message"])[:200]
    return one_line(body[:200].decode(errors="replace"))


# The two load patterns.


async def closed_loop(
    target: Target, prompts: Sequence[str], concurrency: int, on_done: Callable[[], None]
) -> list[Exchange]:
    """Send all prompts, keeping `concurrency` requests in flight; `on_done` is called after each request."""
    exchanges: list[Exchange] = []
    waiting = iter(prompts)

    async def client() -> None:
        for prompt in waiting:
            exchanges.append(await target.exchange(prompt, time.perf_counter()))
            on_done()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(prompts))):
            group.create_task(client())
    return exchanges


async def open_loop(
    target: Target, prompts: Sequence[str], arrivals: Sequence[float], on_done: Callable[[], None]
) -> list[Exchange]:
    """Send each prompt at its arrival time, in seconds from the start; `on_done` is called after each request."""
    exchanges: list[Exchange] = []
    start = time.perf_counter()

    async def client(prompt: str, due: float) -> None:
        await asyncio.sleep(due - time.perf_counter())
        exchanges.append(await target.exchange(prompt, due))
        on_done()

    async with asyncio.TaskGroup() as group:
        for prompt, arrival in zip(prompts, arrivals, strict=True):
            group.create_task(client(prompt, start + arrival))
    return exchanges


def poisson_arrivals(rate: float, num_requests: int, seed: int) -> list[float]:
    """Return the arrival times of a Poisson process of `rate` requests per second: seconds, ascending from 0."""
    rng = random.Random(seed)
    arrivals = [0.0]
    while len(arrivals) < num_requests:
        arrivals.append(arrivals[-1] + rng.expovariate(rate))
    return arrivals
