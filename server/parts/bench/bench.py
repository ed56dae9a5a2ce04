"""`lightwell bench`: send load to an OpenAI-compatible server, and report throughput and latency as its clients see it.

Closed loop: a fixed number of requests is in flight. Open loop: requests arrive at random times (a Poisson process),
however slow the server is. It uses plain asyncio streams and HTTP/1.0, in which the end of an answer is that of the
connection, so that the load generator takes little CPU time from a server on the same machine.
"""

import asyncio
import dataclasses
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from urllib.parse import urlsplit

import msgspec

from server.cli import http_client
from server.cli.parser import CommandError
from server.parts.bench.commands import LoadOptions

_WORDS = (
    "able above across after again air all along animal answer apple arm ask autumn away back bag ball bank base bed "
    "begin bell best big bird black blue boat body book both box boy bread bridge bring brother build bus busy call "
    "camp car card care carry cat cause chair change city class clean clear clock close cloud coat cold color come "
    "cook corn corner count cover cow cross cup cut dance dark day deep desk dinner dog door down draw dream dress "
    "drink drive dry each early earth east easy edge egg end evening face fact fall farm fast field fill find fire "
    "first fish floor flower fly food foot forest form free fresh friend front fruit full game garden gift girl give "
    "glass gold good grass great green ground group grow half hand happy hard hat head hear heart heavy help high hill"
)


@dataclasses.dataclass
class Exchange:
    """One request and its answer as the client saw it. Times are those of `time.perf_counter()`."""

    start: float
    end: float = 0.0
    chunks: list[tuple[float, int | None]] = dataclasses.field(default_factory=list)  # time, number of tokens if known
    usage: http_client.StreamUsage | None = None
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
        import httpx

        self._load = load
        url = urlsplit(load.url)
        assert url.hostname is not None
        self._host = url.hostname
        self._ssl = httpx.create_ssl_context() if url.scheme == "https" else None
        self._port = url.port or (443 if self._ssl else 80)
        is_chat = load.endpoint == "chat"
        path = f"{url.path}/v1/{'chat/completions' if is_chat else 'completions'}"
        key = f"Authorization: Bearer {load.api_key}\r\n" if load.api_key else ""
        self._head = f"POST {path} HTTP/1.0\r\nHost: {url.netloc}\r\n{key}Content-Type: application/json\r\n"
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
        return f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body

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
        except CommandError as error:
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
        _, status, *_ = (await reader.readuntil(b"\r\n\r\n")).split()
        if int(status) != 200:
            raise CommandError(f"HTTP {int(status)}: {_error_message(await reader.read())}")
        async for line in reader:
            data = line[5:].strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                _record_chunk(exchange, data)
        raise CommandError("stream cut off")


def _record_chunk(exchange: Exchange, data: bytes) -> None:
    chunk = http_client.decode_chunk(data)
    if chunk.usage:
        exchange.usage = chunk.usage
    if chunk.text:
        token_ids = chunk.choices[0].token_ids
        exchange.chunks.append((time.perf_counter(), len(token_ids) if token_ids else None))


def _error_message(body: bytes) -> str:
    with suppress(ValueError, TypeError, KeyError, RecursionError):  # msgspec's errors are ValueErrors
        return http_client.one_line(msgspec.json.decode(body)["error"]["message"])[:200]
    return http_client.one_line(body[:200].decode(errors="replace"))


async def send_all(
    target: Target,
    prompts: Sequence[str],
    concurrency: int,
    arrivals: Sequence[float] | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> list[Exchange]:
    """Send all prompts, keeping `concurrency` requests in flight; `on_done` is called after each request.

    With `arrivals`, each is sent at its time in seconds from the start instead.
    """
    exchanges: list[Exchange] = []
    start, slots = time.perf_counter(), asyncio.Semaphore(concurrency)

    async def send(prompt: str) -> None:
        async with slots:
            exchanges.append(await target.exchange(prompt, time.perf_counter()))
            on_done()

    async def send_at(due: float, prompt: str) -> None:
        await asyncio.sleep(due - time.perf_counter())
        exchanges.append(await target.exchange(prompt, due))
        on_done()

    async with asyncio.TaskGroup() as group:
        for number, prompt in enumerate(prompts):
            group.create_task(send(prompt) if arrivals is None else send_at(start + arrivals[number], prompt))
    return exchanges


def poisson_arrivals(rate: float, num_requests: int, seed: int) -> list[float]:
    """Return the arrival times of a Poisson process of `rate` requests per second: seconds, ascending from 0."""
    rng = random.Random(seed)
    return list(accumulate((rng.expovariate(rate) for _ in range(num_requests - 1)), initial=0.0))


class Summary(msgspec.Struct, frozen=True):
    """Mean and percentiles of a set of durations, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The results of one benchmark. A summary is None if nothing was measured."""

    model: str
    endpoint: str
    seed: int
    concurrency: int | None  # closed loop
    rate: float | None  # open loop
    num_requests: int
    num_completed: int
    errors: dict[str, int]
    duration: float  # seconds from the first request to the end of the last answer
    input_tokens: int
    output_tokens: int
    input_tokens_per_second: float
    output_tokens_per_second: float
    requests_per_second: float
    time_to_first_token_ms: Summary | None
    inter_token_latency_ms: Summary | None
    request_latency_ms: Summary | None


def run_benchmark(load: LoadOptions, on_done: Callable[[], None] = lambda: None) -> Report:
    """Run one benchmark; `on_done` is called after each request. Raises CommandError if no server answers."""
    model = load.model
    if model is None:
        with http_client.connect(load.url, load.api_key) as client:
            model = http_client.find_model(client)
    target = Target(load, model)
    exchanges = asyncio.run(_run(load, target, on_done))
    return make_report(load, model, exchanges)


async def _run(load: LoadOptions, target: Target, on_done: Callable[[], None]) -> list[Exchange]:
    try:
        _, writer = await target.connect()
        writer.close()
    except (OSError, UnicodeError) as error:
        raise http_client.not_connected(load.url, error) from None
    await send_all(target, make_prompts(load, load.seed + 1, load.warmup), load.concurrency)
    prompts = make_prompts(load, load.seed, load.num_requests)
    arrivals = None if load.rate is None else poisson_arrivals(load.rate, len(prompts), load.seed)
    return await send_all(target, prompts, load.concurrency, arrivals, on_done)


def summarize(seconds: Sequence[float]) -> Summary | None:
    """Summarize durations given in seconds. Percentiles are interpolated."""
    if not seconds:
        return None
    values = [1e3 * value for value in seconds]
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return Summary(*(round(value, 3) for value in (statistics.fmean(values), cuts[49], cuts[89], cuts[98])))


def make_report(load: LoadOptions, model: str, exchanges: Sequence[Exchange]) -> Report:
    completed = [exchange for exchange in exchanges if exchange.error is None]
    duration = max(e.end for e in exchanges) - min(e.start for e in exchanges)
    input_tokens = sum(e.usage.prompt_tokens for e in completed if e.usage)
    output_tokens = sum(e.num_output_tokens for e in completed)
    return Report(
        model=model,
        endpoint=load.endpoint,
        seed=load.seed,
        concurrency=load.concurrency if load.rate is None else None,
        rate=load.rate,
        num_requests=len(exchanges),
        num_completed=len(completed),
        errors=dict(Counter(e.error for e in exchanges if e.error is not None).most_common()),
        duration=round(duration, 3),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        input_tokens_per_second=round(input_tokens / duration, 1),
        output_tokens_per_second=round(output_tokens / duration, 1),
        requests_per_second=round(len(completed) / duration, 2),
        time_to_first_token_ms=summarize([e.chunks[0][0] - e.start for e in completed if e.chunks]),
        inter_token_latency_ms=summarize([s for e in completed for s in e.inter_token_latencies()]),
        request_latency_ms=summarize([e.end - e.start for e in completed]),
    )


def bench(load: LoadOptions, *, as_json: bool) -> int:
    """Run one benchmark, print its report and return the exit status: 1 if no request succeeded, else 0."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Requests", total=load.num_requests)
        report = run_benchmark(load, lambda: progress.advance(task))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    else:
        _print_report(report)
    return 0 if report.num_completed else 1


def _print_report(report: Report) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    load = f"{report.concurrency} in flight" if report.rate is None else f"{report.rate:g} requests/s"
    title = f"{report.model}, {report.endpoint}, {report.num_requests} requests, {load}, seed {report.seed}"
    table = Table("", *(Column(name, justify="right") for name in ("mean", "p50", "p90", "p99")))
    rows = {
        "time to first token (ms)": report.time_to_first_token_ms,
        "inter-token latency (ms)": report.inter_token_latency_ms,
        "request latency (ms)": report.request_latency_ms,
    }
    for name, summary in rows.items():
        values = msgspec.structs.astuple(summary) if summary else ()
        table.add_row(name, *(f"{value:.1f}" for value in values))
    console = Console(markup=False, highlight=False)
    console.print(title, soft_wrap=True)
    console.print(table)
    console.print(
        f"{report.output_tokens_per_second:g} output tokens/s, {report.input_tokens_per_second:g} input tokens/s, "
        f"{report.requests_per_second:g} requests/s; {report.num_completed} of {report.num_requests} requests "
        f"completed in {report.duration:g} s ({report.input_tokens} tokens in, {report.output_tokens} out)",
        soft_wrap=True,
    )
    for error, count in report.errors.items():
        console.print(f"failed: {count} x {error}", soft_wrap=True)
