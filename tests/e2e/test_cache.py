"""Tests of the KV cache: prefixes are reused, and output depends neither on cached tokens nor on preemption."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import StartServer
from tests.support.kernel_choice import code_paths
from tests.support.kv_cache_memory import kv_cache_flag
from tests.support.server_process import COMPLETIONS, ServerProcess, running_server
from tests.support.streams import Stream, merge

BLOCK_SIZE = 32
PROMPT = "In the year of the great flood, " + "the people of the valley built boats of reed and clay. " * 12


def ask(server: ServerProcess, prompt: str = PROMPT, **fields: Any) -> tuple[list[Any], int, int]:
    """Send a request. Return its choices, the number of prompt tokens and the number of cached ones."""
    body = {"prompt": prompt, "max_tokens": 12, "logprobs": 2, "seed": 1, "temperature": 0.8}
    answer = server.answer(COMPLETIONS, body | fields)
    usage = answer["usage"]
    return answer["choices"], usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def num_cacheable(num_tokens: int) -> int:
    """Return the number of prompt tokens in full blocks, without the last token, which is always computed."""
    return (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_the_second_time_the_prompt_is_cached(server: ServerProcess) -> None:
    hits = server.metric("lightwell_prefix_cache_hits_total")
    first, num_tokens, num_cached = ask(server)
    assert num_cached == 0
    again, _, num_cached = ask(server)
    assert num_cached == num_cacheable(num_tokens) >= 4 * BLOCK_SIZE
    assert again == first
    # Each of the two choices finds the prefix, and both are counted.
    longer, _, num_cached = ask(server, PROMPT + " And then came a stranger", n=2)
    assert num_cached == num_cacheable(num_tokens)
    assert len(longer) == 2
    assert server.metric("lightwell_prefix_cache_hits_total") == hits + 3 * num_cacheable(num_tokens)


def test_a_conversation_is_cached_up_to_its_last_turn(server: ServerProcess) -> None:
    """With AMX, prompts and output are computed differently, so blocks with output tokens are not reused at first."""
    messages = [{"role": "user", "content": "Write a long letter to the sea. " * 8}]
    body: dict[str, Any] = {"messages": messages, "max_tokens": 64, "temperature": 0}
    first = server.answer("/v1/chat/completions", body)
    messages += [first["choices"][0]["message"], {"role": "user", "content": "Now a shorter one."}]
    second = server.answer("/v1/chat/completions", body | {"max_tokens": 1})
    num_reusable = first["usage"]["prompt_tokens" if code_paths()[:1] == ["amx"] else "total_tokens"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= num_reusable - 2 * BLOCK_SIZE
    again = server.answer("/v1/chat/completions", body | {"max_tokens": 1})
    usage = again["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == num_cacheable(usage["prompt_tokens"])


def test_other_keys_find_no_cached_prefix(start_server: StartServer) -> None:
    server = start_server("--api-key=one", "--api-key=two")
    num_cached = []
    for key in ("one", "two", "two", "one"):
        server.http.headers["authorization"] = f"Bearer {key}"
        num_cached.append(ask(server)[2])
    assert num_cached[:2] == [0, 0]
    assert num_cached[2] == num_cached[3] >= 4 * BLOCK_SIZE


def test_alternating_chats_stay_cached(start_server: StartServer) -> None:
    """A turn computes little more than its own message, since the other chat has not taken the blocks of this one."""
    server = start_server()
    chats: list[list[dict[str, str]]] = [[], []]
    num_before = [0, 0]
    for turn in range(3):
        for number, messages in enumerate(chats):
            messages.append({"role": "user", "content": f"Chat {number}, turn {turn}: count from one to ten. " * 8})
            usage = server.answer("/v1/chat/completions", {"messages": messages, "max_tokens": 1})["usage"]
            num_cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert num_cached > num_before[number] - 2 * BLOCK_SIZE
            num_before[number] = usage["prompt_tokens"]
            messages.append({"role": "assistant", "content": "One."})
    assert num_cached > 4 * BLOCK_SIZE


@pytest.mark.checklist("E14")
def test_a_salt_separates_prefixes(server: ServerProcess) -> None:
    plain, num_tokens, _ = ask(server)
    for salt in ("tenant-a", "tenant-b"):
        first, _, num_cached = ask(server, cache_salt=salt)
        assert num_cached == 0
        again, _, num_cached = ask(server, cache_salt=salt)
        assert num_cached == num_cacheable(num_tokens)
        assert first == again == plain


@pytest.mark.checklist("E04")
@pytest.mark.exact
def test_preempted_and_uncached_answers_are_the_same(smollm2_path: Path, server: ServerProcess) -> None:
    """The cache has 11 blocks of 16 tokens for six requests that need four blocks each."""
    flags = ("--block-size=16", "--max-model-len=128", kv_cache_flag(4), "--no-enable-prefix-caching")
    bodies: list[dict[str, Any]] = [
        {
            "prompt": f"Chapter {number}: the",
            "max_tokens": 48,
            "ignore_eos": True,
            "logprobs": 1,
            "seed": number,
            "temperature": float(number % 2),
        }
        for number in range(6)
    ]
    with running_server(smollm2_path, *flags) as tiny_server:
        streams = [Stream(tiny_server, body | {"stream_options": {"include_usage": True}}) for body in bodies]
        preempted = [merge(stream.result().chunks) for stream in streams]
        assert all(stream.is_complete for stream in streams)
        assert tiny_server.metric("lightwell_num_preemptions_total") > 0
        assert tiny_server.is_idle
        usages = [stream.chunks[-1]["usage"] for stream in streams]
        assert [usage["completion_tokens"] for usage in usages] == [48] * 6
        assert tiny_server.metric("lightwell_generation_tokens_total") == 6 * 48
    before = server.metric("lightwell_num_preemptions_total")
    streams = [Stream(server, body) for body in bodies]
    assert [merge(stream.result().chunks) for stream in streams] == preempted
    assert server.metric("lightwell_num_preemptions_total") == before


def test_without_prefix_caching(start_server: StartServer, server: ServerProcess) -> None:
    plain_server = start_server("--no-enable-prefix-caching")
    with_cache, _, _ = ask(server)
    for _ in range(2):
        choices, _, num_cached = ask(plain_server)
        assert num_cached == 0
        assert choices == with_cache
    assert plain_server.metric("lightwell_prefix_cache_hits_total") == 0
