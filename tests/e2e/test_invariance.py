"""Answers are bit for bit the same: in a batch and alone, preempted or not, replayed, and with other settings."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import merge
from tests.support.examples import num_examples
from tests.support.kv_cache_memory import kv_cache_flag
from tests.support.server_process import CHAT, COMPLETIONS, ServerProcess, running_server
from tests.support.streams import Stream

pytestmark = pytest.mark.exact

NUM_STREAMS = num_examples(32, 64)
SEED = 2
SUBJECTS = ["the sea", "a clever fox", "rain in April", "bread", "the moon", "a lost key", "old maps", "trains"]

Body = dict[str, Any]


def kinds(rng: random.Random, subject: str) -> list[tuple[str, Body]]:
    """Return a path and a body of each kind of request about a subject; the last one only scores a prompt."""
    seed = {"seed": rng.randrange(2**63)}
    stops, more_stops = {"stop": ["\n", " a ", ". "]}, {"stop": ["2.", " is", "e"]}
    prompt = [rng.randrange(1000, 40000) for _ in range(rng.randrange(2, 60))]
    chat = seed | {"messages": [{"role": "user", "content": f"Tell me about {subject}."}]}
    sampled = seed | {"temperature": 1.1, "top_p": 0.95, "frequency_penalty": 0.4, "logprobs": 0}
    several = seed | stops | {"temperature": 0.9, "top_k": 40, "n": 2, "logprobs": 1}
    return [
        (COMPLETIONS, {"prompt": f"A poem about {subject}:\n", "temperature": 0, "logprobs": 3}),
        (COMPLETIONS, sampled | {"prompt": f"My thoughts on {subject} are"}),
        (COMPLETIONS, several | {"prompt": f"Once upon a time, {subject}"}),
        (CHAT, chat | {"logprobs": True, "top_logprobs": 2, "temperature": 0.7}),
        (COMPLETIONS, seed | more_stops | {"prompt": f"Facts about {subject}:\n1.", "min_p": 0.05, "echo": True}),
        (COMPLETIONS, {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 2}),
    ]


NUM_KINDS = 6


def make_requests() -> list[tuple[str, Body]]:
    """Return paths and bodies: several different requests of each kind."""
    rng, requests = random.Random(SEED), []
    for number in range(NUM_STREAMS):
        path, body = kinds(rng, f"{rng.choice(SUBJECTS)} number {number}")[number % NUM_KINDS]
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
    for stream in together[: 2 * NUM_KINDS]:
        replay = server.http.post(f"/v1/requests/{stream.chunks[0]['id']}/replay").json()
        assert replay["bit_equal"], replay
    for (path, body), stream in zip(requests, together, strict=True):
        assert normalised(stream.chunks) == normalised([server.answer(path, body)]), (SEED, body)


@pytest.mark.checklist("E04")
def test_preempted_and_uncached_answers_are_the_same(smollm2_path: Path, server: ServerProcess) -> None:
    """The cache has 11 blocks of 16 tokens for six requests that need four blocks each."""
    flags = ("--block-size=16", "--max-model-len=128", kv_cache_flag(4), "--no-enable-prefix-caching")
    fixed: Body = {"max_tokens": 48, "ignore_eos": True, "logprobs": 1}
    bodies = [fixed | {"prompt": f"Chapter {i}: the", "seed": i, "temperature": float(i % 2)} for i in range(6)]
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
