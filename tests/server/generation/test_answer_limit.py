"""Answers that take too much memory, over real sockets."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.parts.recordings.part import Recordings
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, MINIMAL, RESPONSES, shared_server
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_envelope, check_error, raw_request, wait_until

MAX_BYTES = 1 << 20
NUM_TOP = 250  # 25 kB for each token
HEAD = {"content_type": "application/json"}


@pytest.fixture(scope="module")
def shared(model_folder: Path) -> Iterator[RunningServer]:
    settings = {"max_buffered_bytes": MAX_BYTES, "max_logprobs": -1, "api_key": ("alice", "bob")}
    with shared_server(model_folder, settings=settings, endless=True, step_seconds=0.005) as server:
        yield server


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    """A server of two keys whose answers may take a MiB, and whose engine does not stop by itself."""
    yield shared
    shared.reset()


def ask(server: RunningServer, path: str = COMPLETIONS, key: str = "alice", **fields: Any) -> httpx.Response:
    body = MINIMAL.get(path, {"model": "tiny"}) | fields
    return httpx.post(server.url + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)


def is_empty(server: RunningServer) -> bool:
    """Whether neither the engine nor this process has anything of a request."""
    return server.context.answers.num_bytes == server.model.client.num_in_flight == server.engine.num_choices == 0


@pytest.mark.checklist("A19")
@pytest.mark.parametrize(
    ("path", "param", "fields"),
    [
        (COMPLETIONS, "logprobs", {"logprobs": NUM_TOP}),
        (CHAT, "top_logprobs", {"logprobs": True, "top_logprobs": NUM_TOP, "n": 2}),
        (RESPONSES, "top_logprobs", {"top_logprobs": 20, "include": ["message.output_text.logprobs"]}),
    ],
)
def test_an_answer_that_becomes_too_large_ends(
    server: RunningServer, path: str, param: str, fields: dict[str, Any]
) -> None:
    length = "max_output_tokens" if path == RESPONSES else "max_tokens"
    error = check_error(ask(server, path, **{length: 1900} | fields), 400)
    assert error["param"] == param
    assert str(MAX_BYTES) in error["message"]
    assert "--max-buffered-bytes" in error["message"]
    wait_until(lambda: is_empty(server))
    assert server.metric("lightwell_generation_tokens_total") < 1000


@pytest.mark.checklist("A19")
@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("logprobs", {"logprobs": NUM_TOP, "max_tokens": 50, "ignore_eos": True}),
        ("logprobs", {"logprobs": NUM_TOP, "max_tokens": 60, "min_tokens": 50, "stop": ["q"]}),
        ("prompt_logprobs", {"prompt_logprobs": 240, "prompt": "x" * 60, "max_tokens": 1}),
        ("logprobs", {"logprobs": 20, "echo": True, "stream": True, "prompt": "x" * 1000, "max_tokens": 0}),
        ("n", {"echo": True, "prompt": "x" * 1900, "max_tokens": 9, "n": 60}),
    ],
)
def test_an_answer_that_is_certain_to_be_too_large_is_refused_at_once(
    server: RunningServer, param: str, fields: dict[str, Any]
) -> None:
    assert check_error(ask(server, **fields), 400)["param"] == param
    assert server.engine.submits == []
    assert is_empty(server)


def test_a_stream_may_send_more_than_the_limit(server: RunningServer) -> None:
    response = ask(server, CHAT, logprobs=True, top_logprobs=NUM_TOP, max_tokens=150, stream=True)
    *chunks, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "length"
    assert len(response.content) > 1.5 * MAX_BYTES
    wait_until(lambda: is_empty(server))


@pytest.mark.checklist("A19")
@pytest.mark.parametrize("fields", [{}, {"stream_interval": 10_000}])
def test_a_stream_that_is_not_read_ends(server: RunningServer, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "prompt": "x", "logprobs": NUM_TOP, "max_tokens": 1900, "stream": True, **fields}
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = {"authorization": "Bearer alice", "connection": "close", **HEAD}
        connection.sendall(raw_request("POST", COMPLETIONS, json.dumps(body).encode(), **head))
        wait_until(lambda: server.engine.num_choices == 1)
        wait_until(lambda: server.engine.num_choices == 0)
        assert server.metric("lightwell_generation_tokens_total") < 1000
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        with connection.makefile("rb") as file:
            events = [line.removeprefix(b"data: ") for line in file if line.startswith(b"data: ")]
    *_, error, done = events
    assert "has not been read" in check_envelope(error)["message"]
    assert done.strip() == b"[DONE]"
    wait_until(lambda: is_empty(server))


@pytest.mark.checklist("A19")
def test_a_client_that_does_not_read_its_answers_does_not_keep_others_out(server: RunningServer) -> None:
    """Bob is answered while Alice's answers fill the limit; some of hers are cut off."""
    body = {"model": "tiny", "prompt": "x", "logprobs": NUM_TOP, "max_tokens": 15}
    request = raw_request("POST", COMPLETIONS, json.dumps(body).encode(), authorization="Bearer alice", **HEAD)
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        for _ in range(6):
            connection = stack.enter_context(server.connect())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request)
        bob = [threads.submit(ask, server, key="bob", logprobs=NUM_TOP, max_tokens=8) for _ in range(2)]
        assert [future.result().status_code for future in bob] == [200, 200]
        assert server.context.answers.num_bytes <= 2 * MAX_BYTES
    wait_until(lambda: is_empty(server))


def test_a_large_answer_counts_until_it_is_read(start_server: StartServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.endless = True
    server = start_server(max_buffered_bytes=32 << 20, max_logprobs=-1)
    body = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": NUM_TOP, "max_tokens": 1200}
    with server.connect() as connection:
        connection.sendall(raw_request("POST", CHAT, json.dumps(body).encode(), connection="close", **HEAD))
        wait_until(lambda: any(each.flow.write_paused for each in server.connections if each.cycle))
        assert server.metric("lightwell_request_success_total", finished_reason="length") == 1
        assert server.context.answers.num_bytes > 24 << 20
        with connection.makefile("rb") as file:
            head, answer = b"".join(iter(file.readline, b"\r\n")), file.readline()
    assert head.startswith(b"HTTP/1.1 200 ")
    assert len(json.loads(answer)["choices"][0]["logprobs"]["content"]) == 1200
    wait_until(lambda: is_empty(server))


INPUTS: dict[str, dict[str, Any]] = {  # the last field is for many texts
    "/v1/embeddings": {"input": ...},
    "/api/embed": {"input": ...},
    "/v1/rerank": {"query": "x", "documents": ...},
    "/v1/score": {"text_1": "x", "text_2": ...},
}


@pytest.mark.checklist("A19")
@pytest.mark.parametrize("path", INPUTS)
def test_embeddings_that_are_too_large_are_refused(server: RunningServer, path: str) -> None:
    """At once if they are too large alone."""
    *_, param = INPUTS[path]

    def embed(num_texts: int) -> httpx.Response:
        return ask(server, path, **INPUTS[path] | {param: list(map(str, range(num_texts)))})  # 3,200 bytes each

    answer = embed(400)
    assert answer.status_code == 400
    assert f"Invalid '{param}'" in answer.text
    assert "--max-buffered-bytes" in answer.text
    assert server.engine.submits == []
    server.engine.config.step_seconds = 0.0
    server.engine.pause()
    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(embed, 300) for _ in range(2)]
        wait_until(lambda: server.engine.num_choices == 2 * server.engine.config.max_num_seqs)
        server.engine.resume()  # both go on in turn
        assert sorted(each.result().status_code for each in answers) == [200, 503]
    wait_until(lambda: is_empty(server))


@pytest.mark.checklist("A19")
def test_an_answer_that_is_replayed_has_a_limit(start_server: StartServer, fake_engine: FakeEngine) -> None:
    # The stream is read meanwhile, so that little of it is in memory.
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.001
    server = start_server(max_buffered_bytes=MAX_BYTES, record_requests=1)
    answer = ask(server, max_tokens=1300, stream=True)  # 900 bytes for each token, as recordings have alternatives
    assert answer.text.endswith("data: [DONE]\n\n")
    assert "error" not in answer.text
    replay = f"/v1/requests/{answer.headers['x-request-id']}/replay"
    wait_until(lambda: len(server.context.part(Recordings)) == 1)
    assert "--max-buffered-bytes" in check_error(ask(server, replay), 400)["message"]
    wait_until(lambda: is_empty(server))
