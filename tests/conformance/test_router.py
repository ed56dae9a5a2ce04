"""vllm-router with cache-aware routing in front of two servers: clients, cancellation, cached prefixes.

The router is installed in an environment of its own, which `make test-long` creates from its lock file.
"""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.bench.serve import wait_until_ready
from tests.conformance.table import CLIENTS, ENVIRONMENTS
from tests.conformance.test_clients import KEY, failures, run_checks
from tests.support.server_process import MODEL, REQUEST_SECONDS, ServerProcess, free_port, shared_server
from tests.support.serving import wait_until

pytestmark = pytest.mark.long

ROUTER = ENVIRONMENTS / "router" / "bin" / "vllm-router"
FLAGS = ("--max-num-seqs=16", "--max-model-len=4096", "--kv-cache-memory=256MiB", f"--api-key={KEY}")
NOT_FORWARDED = {"responses"}  # the router drops the client's key on paths that it does not know; docs/kubernetes.md
WITHIN_SECONDS = 60.0  # bounds hangs only
BLOCK_SIZE = 32

Messages = list[dict[str, str]]


@contextmanager
def running_router(folder: Path, *servers: ServerProcess) -> Iterator[str]:
    """Start the router and yield its URL once it accepts requests."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    addresses = ("--host=127.0.0.1", f"--port={port}", f"--prometheus-port={free_port()}")
    checks = ("--worker-startup-check-interval=1", "--health-check-interval-secs=60")
    workers = ("--worker-urls", *(server.url for server in servers))
    with (folder / "router.log").open("wb") as log:
        router = subprocess.Popen(
            [str(ROUTER), *addresses, *checks, "--policy=cache_aware", *workers], stdout=log, stderr=log
        )
    try:
        wait_until_ready(f"{url}/health", router)
        yield url
    finally:
        router.kill()
        router.wait()


@pytest.fixture(scope="module")
def servers(smollm2_path: Path) -> Iterator[list[ServerProcess]]:
    assert ROUTER.exists(), "`make test-long` installs the router"
    with ExitStack() as stack:
        servers = [stack.enter_context(shared_server(smollm2_path, *FLAGS)) for _ in range(2)]
        for server in servers:
            server.http.headers["authorization"] = f"Bearer {KEY}"
        yield servers


@pytest.fixture(scope="module")
def url(servers: list[ServerProcess], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_router(tmp_path_factory.mktemp("router"), *servers) as url:
        yield url


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=REQUEST_SECONDS)


def test_a_client_through_the_router(url: str) -> None:
    (openai_client,) = (client for client in CLIENTS if client.file == "openai_client.py")
    checks = run_checks(openai_client, url)
    forwarded = [check for check in checks if not NOT_FORWARDED.intersection(check["exercises"])]
    assert len(forwarded) >= 4
    assert not failures(forwarded), "\n".join(failures(forwarded))


@contextmanager
def long_stream(client: openai.OpenAI, servers: list[ServerProcess]) -> Iterator[None]:
    """Stream a long answer, which is closed after the block, and wait until the servers are idle."""
    fields: Any = {"max_tokens": 3500, "stream": True, "extra_body": {"ignore_eos": True}}
    messages: Any = [{"role": "user", "content": "Tell me a very long story."}]
    wait_until(lambda: all(server.is_idle for server in servers), WITHIN_SECONDS)
    with client.chat.completions.create(model=MODEL, messages=messages, **fields) as stream:
        next(iter(stream))
        yield
    wait_until(lambda: all(server.is_idle for server in servers), WITHIN_SECONDS)


def test_a_stream_that_is_closed_ends_in_the_server(url: str, servers: list[ServerProcess]) -> None:
    def num_aborts() -> float:
        return sum(server.metric("lightwell_request_success_total", finished_reason="abort") for server in servers)

    before = num_aborts()
    with client_of(url) as client, long_stream(client, servers):
        assert sum(server.num_running for server in servers) == 1
    assert num_aborts() == before + 1


def test_conversations_stay_where_their_prefix_is(servers: list[ServerProcess], tmp_path: Path) -> None:
    """Three conversations begin on each server and take turns. Each turn finds the blocks of the earlier ones."""
    before = [num_prompts(server) for server in servers]
    conversations: list[Messages] = [
        [{"role": "system", "content": f"{name} is your name. " * 20}]
        for name in ("Ada", "Bertrand", "Clementine", "Dagobert", "Esmeralda", "Ferdinand")
    ]
    with running_router(tmp_path, *servers) as url, client_of(url) as client:
        with long_stream(client, servers):  # the router sends what it does not know to the server that has less to do
            earlier = [next_turn(client, messages).prompt_tokens for messages in conversations[:3]]
        earlier += [next_turn(client, messages).prompt_tokens for messages in conversations[3:]]
        for _ in range(2):
            for index, messages in enumerate(conversations):
                usage = next_turn(client, messages)
                assert usage.prompt_tokens_details.cached_tokens >= earlier[index] // BLOCK_SIZE * BLOCK_SIZE
                earlier[index] = usage.prompt_tokens
    shares = [num_prompts(server) - count for server, count in zip(servers, before, strict=True)]
    assert sorted(shares) == [9, 9 + 1]  # and the long stream


def next_turn(client: openai.OpenAI, messages: Any) -> Any:
    """Append a question and its answer to the conversation, and return the usage."""
    messages.append({"role": "user", "content": f"Question {len(messages)}: what is your name?"})
    fields: Any = {"max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(model=MODEL, messages=messages, **fields)
    messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
    return answer.usage


def num_prompts(server: ServerProcess) -> float:
    return server.metric("lightwell_request_prompt_tokens_count")
