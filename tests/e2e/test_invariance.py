"""Answers are bit for bit the same: in a batch and alone, preempted or not, replayed, and with other settings."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import StartServer
from tests.support.examples import num_examples
from tests.support.kv_cache_memory import kv_cache_flag
from tests.support.server_process import CHAT, COMPLETIONS, ServerProcess, running_server
from tests.support.streams import Stream, merge

pytestmark = pytest.mark.exact

NUM_STREAMS = num_examples(32, 64)
SEED = 2
SUBJECTS = ["the sea", "a clever fox", "rain in April", "bread", "the moon", "a lost key", "old maps", "trains"]

Body = dict[str, Any]
# A path and the body of a request about a subject.
KINDS: list[tuple[str, Callable[[random.Random, str], Body]]] = [
    (COMPLETIONS, lambda rng, subject: {"prompt": f"A poem about {subject}:\n", "temperature": 0, "logprobs": 3}),
    (
        COMPLETIONS,
        lambda rng, subject: (
            {"prompt": f"My thoughts on {subject} are", "temperature": 1.1, "top_p": 0.95}
            | {"seed": rng.randrange(2**63), "logprobs": 0, "frequency_penalty": 0.4}
        ),
    ),
    (
        COMPLETIONS,
        lambda rng, subject: (
            {"prompt": f"Once upon a time, {subject}", "temperature": 0.9, "top_k": 40, "n": 2}
            | {"seed": rng.randrange(2**63), "logprobs": 1, "stop": ["\n", " a ", ". "]}
        ),
    ),
    (
        CHAT,
        lambda rng, subject: (
            {"messages": [{"role": "user", "content": f"Tell me about {subject}."}]}
            | {"seed": rng.randrange(2**63), "logprobs": True, "top_logprobs": 2, "temperature": 0.7}
        ),
    ),
    (
        COMPLETIONS,
        lambda rng, subject: (
            {"prompt": f"A list of facts about {subject}:\n1.", "seed": rng.randrange(2**63)}
            | {"min_p": 0.05, "stop": ["2.", " is", "e"], "echo": True}
        ),
    ),
    (
        COMPLETIONS,
        lambda rng, subject: (
            {"prompt": [rng.randrange(1000, 40000) for _ in range(rng.randrange(2, 60))]}
            | {"max_tokens": 0, "echo": True, "logprobs": 2}
        ),
    ),
]


def make_requests() -> list[tuple[str, Body]]:
    """Return paths and bodies: several different requests of each kind."""
    rng = random.Random(SEED)
    requests = []
    for number in range(NUM_STREAMS):
        path, make = KINDS[number % len(KINDS)]
        body = make(rng, f"{rng.choice(SUBJECTS)} number {number}")
        requests.append((path, {"max_tokens": rng.randrange(4, 14)} | body))
    return requests


def normalised(answers: list[Body]) -> tuple[Any, int, int]:
    """Return what must be equal for a stream and a whole response: choices, and numbers of tokens."""
    usage = answers[-1]["usage"]
    return merge(answers), usage["prompt_tokens"], usage["completion_tokens"]


@pytest.mark.checklist("E15")
def test_each_of_many_streams_is_equal_to_its_run_alone_and_to_its_replay(server: ServerProcess) -> None:
    requests = make_requests()
    streams = [Stream(server, body | {"stream_options": {"include_usage": True}}, path) for path, body in requests]
    together = [stream.result() for stream in streams]
    assert all(stream.is_complete for stream in together)
    for stream in together[: 2 * len(KINDS)]:
        replay = server.http.post(f"/v1/requests/{stream.chunks[0]['id']}/replay").json()
        assert replay["bit_equal"], replay
    for (path, body), stream in zip(requests, together, strict=True):
        assert normalised(stream.chunks) == normalised([server.answer(path, body)]), (SEED, body)


def test_scoring_is_batch_invariant(server: ServerProcess) -> None:
    """The log probabilities of many prompts in one request are those of each prompt alone."""
    rng = random.Random(SEED + 1)
    bodies = [KINDS[-1][1](rng, "") for _ in range(12)]
    together = server.answer(COMPLETIONS, bodies[0] | {"prompt": [body["prompt"] for body in bodies]})
    for choice, body in zip(together["choices"], bodies, strict=True):
        (alone,) = server.answer(COMPLETIONS, body)["choices"]
        assert choice | {"index": 0} == alone
        first, *others = choice["logprobs"]["token_logprobs"]
        assert first is None
        assert len(others) == len(body["prompt"]) - 1
        assert all(logprob < 0 for logprob in others)


@pytest.mark.checklist("E04")
def test_preempted_and_uncached_answers_are_the_same(smollm2_path: Path, server: ServerProcess) -> None:
    """The cache has 11 blocks of 16 tokens for six requests that need four blocks each."""
    flags = ("--block-size=16", "--max-model-len=128", kv_cache_flag(4), "--no-enable-prefix-caching")
    fixed: Body = {"max_tokens": 48, "ignore_eos": True, "logprobs": 1}
    bodies = [
        fixed | {"prompt": f"Chapter {number}: the", "seed": number, "temperature": float(number % 2)}
        for number in range(6)
    ]
    with running_server(smollm2_path, *flags) as tiny_server:
        streams = [Stream(tiny_server, body | {"stream_options": {"include_usage": True}}) for body in bodies]
        preempted = [merge(stream.result().chunks) for stream in streams]
        assert all(stream.is_complete for stream in streams)
        assert tiny_server.metric("lightwell_num_preemptions_total") > 0
        assert tiny_server.metric("lightwell_prefix_cache_hits_total") == 0
        assert tiny_server.is_idle
        assert [stream.chunks[-1]["usage"]["completion_tokens"] for stream in streams] == [48] * 6
    before = server.metric("lightwell_num_preemptions_total")
    streams = [Stream(server, body) for body in bodies]
    assert [merge(stream.result().chunks) for stream in streams] == preempted
    assert server.metric("lightwell_num_preemptions_total") == before


PROMPTS = [f"A story about the number {number}, which nobody liked." for number in range(9)]


def answers(server: ServerProcess) -> list[Any]:
    """Return the texts and log probabilities of requests that run at the same time."""

    def complete(prompt: str) -> Any:
        body = {"prompt": prompt, "max_tokens": 12, "logprobs": 2, "seed": 5, "ignore_eos": True}
        return server.answer(COMPLETIONS, body)["choices"]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(complete, PROMPTS))


@pytest.mark.long
def test_answers_of_several_engines_and_api_processes_are_those_of_one(start_server: StartServer) -> None:
    """With the same number of threads, and counted together."""
    one_thread = {"OMP_NUM_THREADS": "1"}
    one = start_server(**one_thread)
    expected = answers(one)
    assert "engines" not in one.get("/health").json()
    for flag in ("--data-parallel-size=2", "--api-server-count=3"):
        server = start_server(flag, **one_thread)
        assert answers(server) == expected
        assert server.metric("lightwell_generation_tokens_total") == 12 * len(PROMPTS)
        server.close()
