"""Synthetic traces of requests with the published statistics of real ones: when they arrive, how long they are, and
which of them begin alike.

Lengths and arrivals of `conversation` and `code` are those of the Azure LLM inference traces of 2023 (Patel et al.,
"Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA 2024; 19,366 and 8,819 requests of an hour,
CC-BY): the table has their percentiles, and the coefficient of variation of the times between two requests. Two traces
of May 2024 (Stojkovic et al., "DynamoLLM", HPCA 2025) have 45 and 28 requests per second on average of a week.

`burst` follows BurstGPT (Wang et al., "BurstGPT: A Real-World Workload Dataset to Optimize LLM Serving Systems", KDD
2025): gaps are Gamma distributed, as there, and the percentiles are those of the first 38 conversations that the page
of the data set shows. Its `gap_cv` is an assumption.

None of these traces has the text of a prompt. What prompts share is set so that a cache which never forgets would hold
about the share of the prompts that Wang et al., "KVCache Cache in the Wild" (USENIX ATC 2025), found at a large
provider: 62 % for chats, 54 % for programs.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.shared.block_hashes import extend_block_hashes

PERCENTS = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
MIN_NEW_TOKENS = 8  # of a prompt that continues a conversation
NUM_SYSTEM_PROMPTS = 32  # the k-th most popular is used 1/k as often as the first


@dataclass(frozen=True)
class Shape:
    """The statistics of a trace."""

    prompt_tokens: tuple[int, ...]  # at PERCENTS
    answer_tokens: tuple[int, ...]
    gap_cv: float  # standard deviation over mean of the times between requests; 1: a Poisson process
    mean_turns: float  # requests of a session; each prompt begins with the one before it and its answer
    mean_pause: float  # seconds between two requests of a session
    system_tokens: int  # that the prompts of many sessions begin with


SHAPES = {
    "conversation": Shape(
        prompt_tokens=(2, 29, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 14050),
        answer_tokens=(7, 16, 41, 54, 85, 129, 395, 424, 451, 601, 1000),
        gap_cv=1.1,
        mean_turns=4.0,
        mean_pause=30.0,
        system_tokens=256,
    ),
    "code": Shape(
        prompt_tokens=(3, 17, 75, 147, 578, 1469, 2744, 5187, 7303, 7436, 7437),
        answer_tokens=(6, 6, 6, 7, 9, 13, 24, 55, 90, 251, 1899),
        gap_cv=13.2,
        mean_turns=4.0,
        mean_pause=5.0,
        system_tokens=256,
    ),
    "burst": Shape(
        prompt_tokens=(14, 15, 19, 33, 175, 594, 1322, 1533, 1599, 1803, 1840),
        answer_tokens=(11, 14, 61, 124, 219, 336, 442, 519, 614, 1283, 1656),
        gap_cv=2.0,
        mean_turns=3.0,
        mean_pause=30.0,
        system_tokens=128,
    ),
}


@dataclass(slots=True, eq=False)
class Arrival:
    """A request. Its tokens are bytes, since the simulation needs no more different ones."""

    time: float  # seconds
    session: int
    prompt: bytes
    answer: bytes
    tenant: str = ""
    weight: float = 1.0


@dataclass(slots=True)
class Session:
    """A conversation: what it has said, and how long its next prompts and answers are."""

    number: int
    history: bytes
    lengths: list[tuple[int, int]]  # of prompt and answer, the next one last


def arrival_times(rate: float, seconds: float, gap_cv: float, rng: random.Random) -> Iterator[float]:
    """Yield ascending times of a renewal process with Gamma distributed gaps."""
    shape = gap_cv**-2
    time = 0.0
    while (time := time + rng.gammavariate(shape, 1 / (shape * rate))) < seconds:
        yield time


def quantile(points: Sequence[int], percent: float) -> int:
    """Interpolate between the values at PERCENTS."""
    index = min(bisect_right(PERCENTS, percent), len(PERCENTS) - 1)
    left, right = PERCENTS[index - 1], PERCENTS[index]
    part = (percent - left) / (right - left)
    return round(points[index - 1] * (1 - part) + points[index] * part)


def block_hashes(tokens: bytes, block_size: int) -> list[bytes]:
    """Return the hashes of the full blocks, as the engine computes them."""
    hashes: list[bytes] = []
    extend_block_hashes(hashes, tokens, block_size)
    return hashes


class TraceWriter:
    """Makes the requests of a trace one by one."""

    def __init__(self, shape: Shape, max_model_len: int, rng: random.Random) -> None:
        self.shape = shape
        self.max_model_len = max_model_len
        self.rng = rng
        self.num_sessions = 0
        self.due: list[tuple[float, int, Session]] = []  # heap: when the next request of a session is due
        self.system_prompts = [rng.randbytes(shape.system_tokens) for _ in range(NUM_SYSTEM_PROMPTS)]
        self.popularity = [1 / (rank + 1) for rank in range(NUM_SYSTEM_PROMPTS)]

    def request(self, time: float) -> Arrival:
        """Return the request that arrives at `time`: of the session that is due for longest, or else of a new one."""
        session = heapq.heappop(self.due)[2] if self.due and self.due[0][0] <= time else self._new_session()
        num_prompt_tokens, num_answer_tokens = session.lengths.pop()
        kept = session.history[: max(0, num_prompt_tokens - MIN_NEW_TOKENS)]
        prompt = kept + self.rng.randbytes(num_prompt_tokens - len(kept))
        answer = self.rng.randbytes(num_answer_tokens)
        session.history = prompt + answer
        if session.lengths:
            pause = self.rng.expovariate(1 / self.shape.mean_pause)
            heapq.heappush(self.due, (time + pause, session.number, session))
        return Arrival(time, session.number, prompt, answer)

    def _new_session(self) -> Session:
        self.num_sessions += 1
        num_turns = 1
        while self.rng.random() > 1 / self.shape.mean_turns:
            num_turns += 1
        system_prompt = self.rng.choices(self.system_prompts, self.popularity)[0]
        lengths = sorted((self._lengths() for _ in range(num_turns)), reverse=True)
        return Session(self.num_sessions, system_prompt, lengths)

    def _lengths(self) -> tuple[int, int]:
        """Draw the lengths of a prompt and of its answer, which do not depend on each other in Azure's traces."""
        answer = quantile(self.shape.answer_tokens, self.rng.uniform(0, 100))
        prompt = quantile(self.shape.prompt_tokens, self.rng.uniform(0, 100))
        return min(prompt, self.max_model_len - answer), answer


def make_trace(shape: Shape, rate: float, seconds: float, *, seed: int, max_model_len: int = 1 << 20) -> list[Arrival]:
    """Return the requests of `seconds`, which depend on the seed alone."""
    rng = random.Random(seed)
    writer = TraceWriter(shape, max_model_len, rng)
    return [writer.request(time) for time in arrival_times(rate, seconds, shape.gap_cv, rng)]


def ideal_hit_rate(trace: Sequence[Arrival], block_size: int) -> float:
    """Return the share of the prompts' tokens that one cache would hold if it never forgot a prompt or an answer."""
    seen: set[bytes] = set()
    num_found = 0
    for arrival in trace:
        hashes = block_hashes(arrival.prompt + arrival.answer, block_size)
        usable = (len(arrival.prompt) - 1) // block_size
        num_known = next((index for index, block in enumerate(hashes[:usable]) if block not in seen), usable)
        num_found += num_known * block_size
        seen.update(hashes)
    return num_found / sum(len(arrival.prompt) for arrival in trace)
