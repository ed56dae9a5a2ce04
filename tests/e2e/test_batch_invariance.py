"""Tests of batch invariance: 64 concurrent streams are complete and equal to the same requests run alone."""

import asyncio
import json
import random
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.support.server_process import CHAT, COMPLETIONS, MODEL, REQUEST_SECONDS, ServerProcess
from tests.support.streams import Choice, merge

pytestmark = pytest.mark.exact

NUM_STREAMS = 64
SEED = 2

SUBJECTS = ["the sea", "a clever fox", "rain in April", "bread", "the moon", "a lost key", "old maps", "trains"]

Body = dict[str, Any]


def greedy(rng: random.Random, subject: str) -> tuple[str, Body]:
    return COMPLETIONS, {"prompt": f"A poem about {subject}:\n", "temperature": 0, "logprobs": 3}


def sampled(rng: random.Random, subject: str) -> tuple[str, Body]:
    body = {"prompt": f"My thoughts on {subject} are", "temperature": 1.1, "top_p": 0.95, "seed": rng.randrange(2**63)}
    return COMPLETIONS, body | {"logprobs": 0, "frequency_penalty": 0.4}


def several(rng: random.Random, subject: str) -> tuple[str, Body]:
    body = {"prompt": f"Once upon a time, {subject}", "temperature": 0.9, "top_k": 40, "seed": rng.randrange(2**63)}
    return COMPLETIONS, body | {"n": 2, "logprobs": 1, "stop": ["\n", " a ", ". "]}


def chat(rng: random.Random, subject: str) -> tuple[str, Body]:
    body = {"messages": [{"role": "user", "content": f"Tell me about {subject}."}], "seed": rng.randrange(2**63)}
    return CHAT, body | {"logprobs": True, "top_logprobs": 2, "temperature": 0.7}


def stopped(rng: random.Random, subject: str) -> tuple[str, Body]:
    body = {"prompt": f"A list of facts about {subject}:\n1.", "seed": rng.randrange(2**63), "min_p": 0.05}
    return COMPLETIONS, body | {"stop": ["2.", " is", "e"], "echo": True}


def scored(rng: random.Random, subject: str) -> tuple[str, Body]:
    prompt = [rng.randrange(1000, 40000) for _ in range(rng.randrange(2, 60))]
    return COMPLETIONS, {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 2}


KINDS = (greedy, sampled, several, chat, stopped, scored)


def make_requests() -> list[tuple[str, Body]]:
    """Return paths and bodies: several different requests of each kind."""
    rng = random.Random(SEED)
    requests = []
    for number in range(NUM_STREAMS):
        path, body = KINDS[number % len(KINDS)](rng, f"{rng.choice(SUBJECTS)} number {number}")
        requests.append((path, {"max_tokens": rng.randrange(4, 14)} | body))
    return requests


Answer = tuple[dict[int, Choice], int, int]  # choices, prompt tokens, output tokens


async def ask_stream(client: AsyncOpenAI, path: str, body: Body) -> Answer:
    """Send a request with the official client. Its raw lines are parsed here to check that the stream ends properly."""
    api: Any = client.chat.completions if path == CHAT else client.completions
    openai_fields = {name: body[name] for name in ("prompt", "messages") if name in body} | {
        "model": MODEL,
        "stream": True,
    }
    others = body | {"stream_options": {"include_usage": True}}  # includes fields that OpenAI's API does not have
    async with api.with_streaming_response.create(**openai_fields, extra_body=others) as response:
        lines = [line async for line in response.iter_lines() if line and not line.startswith(":")]
    *events, done = (line.removeprefix("data: ") for line in lines)
    assert done == "[DONE]"
    return normalised([json.loads(event) for event in events])


def normalised(answers: list[Body]) -> Answer:
    """Return what must be equal for a stream and a whole response."""
    usage = answers[-1]["usage"]
    return merge(answers), usage["prompt_tokens"], usage["completion_tokens"]


async def ask_all(url: str, requests: list[tuple[str, Body]]) -> list[Answer]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS) as client:
        return await asyncio.gather(*(ask_stream(client, path, body) for path, body in requests))


@pytest.mark.checklist("E15")
@pytest.mark.anyio
async def test_each_of_64_streams_is_complete_and_equal_to_its_run_alone(server: ServerProcess) -> None:
    requests = make_requests()
    together = await ask_all(server.url, requests)
    for (path, body), (choices, num_prompt_tokens, num_output_tokens) in zip(requests, together, strict=True):
        assert sorted(choices) == list(range(body.get("n", 1)))
        assert all(choice.finish_reason in ("stop", "length") for choice in choices.values())
        alone = normalised([server.answer(path, body)])
        assert (choices, num_prompt_tokens, num_output_tokens) == alone, (SEED, body)
    assert server.is_idle


def test_scoring_is_batch_invariant(server: ServerProcess) -> None:
    """The log probabilities of many prompts in one request are those of each prompt alone."""
    rng = random.Random(SEED + 1)
    bodies = [scored(rng, "")[1] for _ in range(12)]
    together = server.answer(COMPLETIONS, bodies[0] | {"prompt": [body["prompt"] for body in bodies]})
    for choice, body in zip(together["choices"], bodies, strict=True):
        (alone,) = server.answer(COMPLETIONS, body)["choices"]
        assert choice | {"index": 0} == alone
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(body["prompt"])
        assert logprobs["token_logprobs"][0] is None
        assert all(logprob < 0 for logprob in logprobs["token_logprobs"][1:])
