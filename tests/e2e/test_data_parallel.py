"""Tests of a real server with two engines: answers, routing, metrics, records, and the loss of an engine."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.test_restart import children_of
from tests.support.server_process import CHAT, COMPLETIONS, ServerProcess
from tests.support.serving import wait_until
from tests.support.streams import start_streams

READY = 180.0  # seconds; bounds hangs only
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TWO_ENGINES = "--data-parallel-size=2"
PROMPTS = [f"A story about the number {number}, which nobody liked." for number in range(6)]


def states(server: ServerProcess) -> list[str]:
    """Return the state of each engine."""
    return [engine["status"] for engine in server.get("/health").json()["engines"]]


def start_two(start_server: StartServer, *flags: str, **environment: str) -> ServerProcess:
    server = start_server(TWO_ENGINES, *flags, **environment)
    wait_until(lambda: states(server) == ["ok", "ok"], READY)
    return server


def answers(server: ServerProcess) -> list[Any]:
    """Return the texts and log probabilities of requests that run at the same time."""

    def complete(prompt: str) -> Any:
        body = {"prompt": prompt, "max_tokens": 12, "logprobs": 2, "seed": 5, "ignore_eos": True}
        return server.answer(COMPLETIONS, body)["choices"]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(complete, PROMPTS))


def by_engine(server: ServerProcess, name: str) -> list[float]:
    """Return the values of a metric of each engine."""
    return [server.metric(name, engine=number) for number in ("0", "1")]


def engines_of_requests(server: ServerProcess) -> dict[str, int]:
    """Return which engine has which request."""
    data = server.get("/lightwell/v1/requests").json()["data"]
    return {each["id"]: each["engine"] for each in data}


@pytest.mark.exact
def test_answers_are_those_of_a_single_engine(start_server: StartServer) -> None:
    """With the same number of threads, bit for bit."""
    one = start_server(**ONE_THREAD)
    expected = answers(one)
    assert "engines" not in one.get("/health").json()
    one.close()

    server = start_two(start_server, **ONE_THREAD)
    for number in (0, 1):
        assert f"lightwell.engine {number}: engine {number} of 2: CPUs" in server.log
    assert answers(server) == expected
    assert set(engines_of_requests(server).values()) == {0, 1}
    num_tokens = by_engine(server, "lightwell_generation_tokens_total")
    assert sum(num_tokens) == 12 * len(PROMPTS)
    assert all(num_tokens)
    check_records(server)


def check_records(server: ServerProcess) -> None:
    """The records say which engine has computed what."""
    both = [server.get(f"/lightwell/v1/steps?engine={number}").json() for number in (0, 1)]
    assert both[0]["engine"] != both[1]["engine"]
    assert all(each["data"] for each in both)
    assert server.get("/lightwell/v1/engine?engine=1").json()["num_engines"] == 2
    error = server.get("/lightwell/v1/engine?engine=2")
    assert error.status_code == 400
    assert error.json()["error"]["message"] == "Invalid 'engine': expected 0 to 1, but got 2 instead."
    for request_id, number in engines_of_requests(server).items():
        details = server.get(f"/lightwell/v1/requests/{request_id}").json()
        assert [choice["engine"] for choice in details["choices"]] == [number]
        trace = server.get(f"/lightwell/v1/requests/{request_id}/trace").json()
        assert trace["otherData"]["engine"] == both[number]["engine"]
        inside = server.http.post("/lightwell/v1/inspect", json={"id": request_id})
        assert inside.json()["is_equal"], inside.text


class Chat:
    """A chat, of which each turn extends the prompt by about two blocks."""

    def __init__(self, server: ServerProcess, number: int) -> None:
        self.ids: list[str] = []  # of the answers
        self._server = server
        self._number = number
        self._messages: list[dict[str, str]] = []

    def take_turn(self) -> None:
        text = f"This is part {len(self.ids)} of story {self._number}. " * 6
        self._messages.append({"role": "user", "content": text})
        answer = self._server.answer(CHAT, {"messages": self._messages, "max_completion_tokens": 4})
        self.ids.append(answer["id"])
        self._messages.append(answer["choices"][0]["message"])


def test_the_turns_of_a_chat_go_to_the_same_engine(start_server: StartServer) -> None:
    """The first turns, at the same time, are spread over both. Later, no queue is too long."""
    server = start_two(start_server)
    chats = [Chat(server, number) for number in range(4)]
    with ThreadPoolExecutor(len(chats)) as pool:
        list(pool.map(Chat.take_turn, chats))
    for _ in range(3):
        for chat in chats:
            chat.take_turn()
    engines = engines_of_requests(server)
    used = [{engines[request_id] for request_id in chat.ids} for chat in chats]
    assert all(len(each) == 1 for each in used), used
    assert len(set().union(*used)) == 2
    hits, queries = (sum(by_engine(server, f"lightwell_prefix_cache_{name}_total")) for name in ("hits", "queries"))
    assert hits > queries / 3


def test_the_loss_of_an_engine(start_server: StartServer) -> None:
    """Its streams end with an error, and the others go on. It is started again, until it dies too often."""
    server = start_two(start_server)
    streams = start_streams(server, 4, max_tokens=600)
    engines = engines_of_requests(server)
    lost = [stream for stream in streams if engines[stream.chunks[0]["id"]] == 1]
    kept = [stream for stream in streams if stream not in lost]
    assert lost
    assert kept
    info = server.get("/lightwell/v1/engine?engine=1").json()
    dead = max(children_of(server, "engine.process"), key=lambda each: each.pid)
    dead.send_signal(signal.SIGKILL)
    for stream in lost:
        error = stream.result().error
        assert error is not None
        assert error["code"] == "engine_unavailable"
    assert server.get("/health").status_code == 200
    assert "ok" in states(server)
    assert server.complete(max_tokens=3).status_code == 200
    wait_until(lambda: states(server) == ["ok", "ok"], READY)
    for stream in kept:
        assert stream.result().is_complete
    assert by_engine(server, "lightwell_engine_restarts_total") == [0, 1]
    assert server.get("/lightwell/v1/engine?engine=1").json()["engine"] != info["engine"]
    server.signal(signal.SIGTERM)
    assert server.wait(30) == 0, server.end_of_log()


def test_the_server_ends_with_its_last_engine(start_server: StartServer) -> None:
    server = start_two(start_server, "--on-engine-death=exit")
    first, second = children_of(server, "engine.process")
    os.kill(second.pid, signal.SIGKILL)
    wait_until(lambda: sorted(states(server)) == ["dead", "ok"])
    assert server.get("/readyz").status_code == 200
    assert server.complete(max_tokens=3).status_code == 200
    os.kill(first.pid, signal.SIGKILL)
    assert server.wait(30) == 1
    lines = [line for line in server.log.splitlines() if line.startswith("lightwell: error")]
    assert lines[0].endswith("; the server goes on without it")
    assert lines[-1].endswith("process was killed by SIGKILL")
