"""Measure a real server: the time of its steps, to fit a profile, and its answers to a trace, beside the simulation."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import msgspec

from server.api.inspection.schemas import EngineView, StepList, StepView
from server.cli.load_generator import Exchange, LoadOptions, Target, closed_loop, open_loop
from tests.bench.capacity.profiles import Profile
from tests.bench.capacity.step_time import Fit, StepWork, fit
from tests.bench.capacity.summary import Summary, percentiles
from tests.bench.capacity.traces import Arrival
from tests.bench.serve import MODEL_NAME

FIRST_TOKEN_ID = 1000  # that stands for the first of a trace's 256 tokens; most tokens from there on are words
MAX_STEPS = 1024  # of an answer of /lightwell/v1/steps
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
PROMPT_LENGTHS, ANSWER_LENGTHS = (16, 1500), (8, 128)


class TraceTarget(Target):
    """A server that gets the requests of a trace. In the load generator, a prompt is the number of a request."""

    def __init__(self, url: str, trace: Sequence[Arrival]) -> None:
        super().__init__(LoadOptions(url=url), MODEL_NAME)
        self._trace = trace

    def request(self, prompt: str) -> bytes:
        arrival = self._trace[int(prompt)]
        fields = {
            "prompt": to_token_ids(arrival.prompt),
            "max_tokens": len(arrival.answer),
            "min_tokens": len(arrival.answer),
            "return_token_ids": True,
        }
        body = msgspec.json.encode(self._fields | fields)
        return f"{self._head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def to_token_ids(tokens: bytes) -> list[int]:
    return [FIRST_TOKEN_ID + token for token in tokens]


def replay(url: str, trace: Sequence[Arrival]) -> list[Exchange]:
    """Send the requests of a trace when they are due, and return the answers."""
    prompts = [str(number) for number in range(len(trace))]
    times = [arrival.time for arrival in trace]
    return asyncio.run(open_loop(TraceTarget(url, trace), prompts, times, lambda: None))


def measure_steps(url: str, seed: int) -> Fit:
    """Load a server with requests of many lengths, and fit its steps."""
    rng = random.Random(seed)
    found: list[tuple[StepWork, float]] = []
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for concurrency in CONCURRENCIES:
            last = last_step(client)
            trace = [random_request(rng) for _ in range(2 * concurrency + 4)]
            prompts = [str(number) for number in range(len(trace))]
            exchanges = asyncio.run(closed_loop(TraceTarget(url, trace), prompts, concurrency, lambda: None))
            assert not any(exchange.error for exchange in exchanges), exchanges
            found += periods(list(steps_after(client, last)))
    return fit(found)


def random_request(rng: random.Random) -> Arrival:
    """Return a request whose lengths are log-uniformly distributed. It shares no prefix with others."""
    lengths = [round(math.exp(rng.uniform(*map(math.log, bounds)))) for bounds in (PROMPT_LENGTHS, ANSWER_LENGTHS)]
    return Arrival(0.0, 0, rng.randbytes(lengths[0]), bytes(lengths[1]))


def last_step(client: httpx.Client) -> int:
    steps = msgspec.json.decode(client.get("/lightwell/v1/steps?limit=1").content, type=StepList)
    return steps.data[-1].id if steps.data else 0


def steps_after(client: httpx.Client, last: int) -> Iterator[StepView]:
    """Yield the recorded steps after the one with id `last`."""
    has_more = True
    while has_more:
        answer = client.get("/lightwell/v1/steps", params={"after": last, "limit": MAX_STEPS}).raise_for_status()
        steps = msgspec.json.decode(answer.content, type=StepList)
        yield from steps.data
        has_more, last = steps.has_more, steps.data[-1].id if steps.data else last


def periods(steps: Sequence[StepView]) -> list[tuple[StepWork, float]]:
    """Return what each step computed, and the seconds until the next one began, if that had not to wait for work."""
    return [
        (work_of(step), after.started - step.started)
        for step, after in pairwise(steps)
        if step.num_running + step.num_waiting and after.id == step.id + 1
    ]


def work_of(step: StepView) -> StepWork:
    return StepWork.of_rows(
        (row.kind == "prompt", row.position or 0, row.num_tokens, int(row.num_generated > 0)) for row in step.rows
    )


def shares_answers(url: str) -> bool:
    """Return whether a prompt that continues an answer finds its blocks in the prefix cache."""
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:

        def complete(prompt: list[int]) -> dict[str, Any]:
            fields = {"max_tokens": 128, "min_tokens": 128, "temperature": 0, "return_token_ids": True}
            answer = client.post("/v1/completions", json={"model": MODEL_NAME, "prompt": prompt} | fields)
            found: dict[str, Any] = answer.raise_for_status().json()
            return found

        prompt = to_token_ids(random.Random(0).randbytes(8))
        answer = complete(prompt)["choices"][0]["token_ids"]
        cached = complete(prompt + answer)["usage"]["prompt_tokens_details"]["cached_tokens"]
    return bool(cached > 64)


def make_profile(name: str, url: str, step_time: Fit, processor: str, model: str) -> Profile:
    """Return the profile of a running server."""
    answer = httpx.get(f"{url}/lightwell/v1/engine", trust_env=False).raise_for_status()
    engine = msgspec.json.decode(answer.content, type=EngineView)
    return Profile(
        name=name,
        is_measured=True,
        processor=processor,
        model=model,
        step_time=step_time.step_time,
        block_size=engine.block_size,
        num_blocks=engine.num_blocks,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=engine.max_model_len,
        shares_answers=shares_answers(url),
        max_ttft=10.0,
        max_itl=0.1,
    )


def processor_name() -> str:
    """Return the name and the number of processors of this machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores, {time.strftime('%B %Y')}"


def compare(exchanges: Sequence[Exchange], first: float, simulated: Summary) -> list[tuple[str, float, float]]:
    """Return the names of figures with what clients saw and what was simulated. `first`: arrival of the first request.

    Times are in milliseconds.
    """
    assert not any(exchange.error for exchange in exchanges), [exchange.error for exchange in exchanges]
    seconds = max(some.end for some in exchanges) - min(some.start for some in exchanges) + first
    rate = sum(some.num_output_tokens for some in exchanges) / seconds
    spans = [(some.chunks[-1][0] - some.chunks[0][0]) / (some.num_output_tokens - 1) for some in exchanges]
    waits = [some.chunks[0][0] - some.start for some in exchanges]
    rows = [("output tokens per second", rate, simulated.output_tokens_per_second)]
    for name, real, found in (("TTFT", waits, simulated.ttft), ("ITL", spans, simulated.itl)):
        for percent, one, two in zip((50, 90, 99), percentiles(real), found, strict=True):
            rows.append((f"{name} p{percent}", 1e3 * one, 1e3 * two))
    return rows
