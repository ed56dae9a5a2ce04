"""Long texts hold up neither other tenants nor short requests, over real sockets."""

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.tenants import Tenant
from server.text.text_threads import LONG_BYTES, TextThreads
from server.text.tokenizer import Tokenizer
from tests.support.clients import shared_server
from tests.support.serving import RunningServer, wait_until

LONG = "x" * (LONG_BYTES + 1)
KEYS = ("key-one", "key-two")


class SlowTokenizer:
    """Lets the tokenizer of a server take long for long texts: until `go_on` is released, once for each text."""

    def __init__(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.go_on = threading.Semaphore(0)
        self._encode = tokenizer.encode
        monkeypatch.setattr(tokenizer, "encode", self.encode)

    def encode(self, text: str, **options: Any) -> list[int]:
        if len(text) > LONG_BYTES:
            self.begun.append(text)
            assert self.go_on.acquire(timeout=60)
            return [97]
        return self._encode(text, **options)


def ask(server: RunningServer, path: str, body: dict[str, Any], key: str = KEYS[0]) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(server.url + path, json={"model": "tiny"} | body, headers=headers, timeout=30)


@contextmanager
def long_requests(server: RunningServer, count: int, key: str = KEYS[0]) -> Iterator[list[Future[httpx.Response]]]:
    with ThreadPoolExecutor(count) as pool:
        yield [
            pool.submit(ask, server, "/v1/completions", {"prompt": LONG, "max_tokens": 1}, key) for _ in range(count)
        ]


@pytest.fixture(scope="module")
def guarded(model_folder: Path) -> Iterator[RunningServer]:
    engine = {"max_num_seqs": 64, "max_model_len": 1 << 20}
    with shared_server(model_folder, settings={"api_key": KEYS}, **engine) as server:
        yield server


SHORT: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("/tokenize", {"prompt": "a"}),
    ("/detokenize", {"tokens": [97]}),
]


def test_short_requests_pass_long_ones_of_the_same_tenant(
    guarded: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = SlowTokenizer(guarded.model.tokenizer, monkeypatch)
    with long_requests(guarded, 40) as waiting:
        wait_until(lambda: guarded.model.client.num_in_flight == 40)
        for path, body in SHORT:
            assert ask(guarded, path, body).status_code == 200
        assert not any(each.done() for each in waiting)
        tokenizer.go_on.release(40)
        assert {each.result().status_code for each in waiting} == {200}


def test_tenants_take_turns_with_long_texts(guarded: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SlowTokenizer(guarded.model.tokenizer, monkeypatch)
    other = "y" * len(LONG)
    with long_requests(guarded, 30) as waiting, ThreadPoolExecutor(1) as pool:
        wait_until(lambda: guarded.model.client.num_in_flight == 30)
        wait_until(lambda: len(tokenizer.begun) > 0)
        num_threads = len(tokenizer.begun)
        answer = pool.submit(ask, guarded, "/v1/completions", {"prompt": other, "max_tokens": 1}, KEYS[1])
        wait_until(lambda: guarded.model.client.num_in_flight == 31)
        tokenizer.go_on.release(num_threads + 2)
        assert answer.result(60).status_code == 200
        assert tokenizer.begun.index(other) <= num_threads + 1
        tokenizer.go_on.release(30)
        assert {each.result().status_code for each in waiting} == {200}


def test_a_long_stored_conversation_counts_as_a_long_text(
    guarded: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = SlowTokenizer(guarded.model.tokenizer, monkeypatch)
    tokenizer.go_on.release()
    stored = ask(guarded, "/v1/responses", {"input": LONG, "max_output_tokens": 1}).json()["id"]
    count = 1 + (os.cpu_count() or 1)  # as many as fill the threads for short texts
    threads = guarded.context.text_threads
    run_in_thread, texts = threads.run, list[int]()

    async def run(tenant: Tenant, num_bytes: int, *work: Any) -> Any:
        texts.append(num_bytes)
        return await run_in_thread(tenant, num_bytes, *work)

    with long_requests(guarded, 30) as waiting, ThreadPoolExecutor(count) as pool:
        wait_until(lambda: guarded.model.client.num_in_flight == 30)
        monkeypatch.setattr(threads, "run", run)
        body = {"input": "a", "previous_response_id": stored, "max_output_tokens": 1}
        continued = [pool.submit(ask, guarded, "/v1/responses", body) for _ in range(count)]
        wait_until(lambda: len(texts) == count)
        assert ask(guarded, "/v1/completions", {"prompt": "a"}).status_code == 200
        assert not any(each.done() for each in waiting)
        tokenizer.go_on.release(30 + count)
        assert {each.result().status_code for each in [*waiting, *continued]} == {200}


def test_there_are_as_many_threads_as_cores() -> None:
    """Half as many for long texts, but at least one."""

    async def most_at_once(num_bytes: int, num_cores: int, expected: int) -> int:
        threads, running, most = TextThreads(num_cores), 0, 0
        all_run = threading.Barrier(expected, timeout=60)

        def work() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            all_run.wait()
            running -= 1

        await asyncio.gather(*(threads.run(Tenant(name="a"), num_bytes, work) for _ in range(12)))
        return most

    for num_cores, num_long in ((1, 1), (4, 2)):
        assert asyncio.run(most_at_once(LONG_BYTES, num_cores, num_cores)) == num_cores
        assert asyncio.run(most_at_once(LONG_BYTES + 1, num_cores, num_long)) == num_long
