"""Tests of a real server with three API processes: answers, the division of work, the end of one, draining."""

import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from openai import OpenAI

from tests.e2e.conftest import StartServer
from tests.e2e.test_restart import children_of, kill_engine
from tests.support.server_process import COMPLETIONS, MODEL, ServerProcess
from tests.support.serving import wait_until
from tests.support.streams import start_streams

THREE = "--api-server-count=3"
PROMPTS = [f"A story about the number {number}, which nobody liked." for number in range(9)]


def answers(server: ServerProcess) -> list[Any]:
    """Return the texts and log probabilities of requests that run at the same time."""

    def complete(prompt: str) -> Any:
        body = {"prompt": prompt, "max_tokens": 12, "logprobs": 2, "seed": 5, "ignore_eos": True}
        return server.answer(COMPLETIONS, body)["choices"]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(complete, PROMPTS))


def num_connections(server: ServerProcess) -> list[int]:
    """Return how many connections with clients each API process has."""
    found = []
    for process in sorted(children_of(server, "server.main"), key=lambda each: each.pid):
        connections = process.net_connections(kind="tcp")
        found.append(sum(each.status == psutil.CONN_ESTABLISHED for each in connections))
    return found


@pytest.mark.exact
def test_answers_are_those_of_a_single_process(start_server: StartServer) -> None:
    """Bit for bit, and counted together."""
    one = start_server()
    expected = answers(one)
    one.close()
    server = start_server(THREE)
    assert answers(server) == expected
    labels = {"handler": COMPLETIONS, "status": "200"}
    wait_until(lambda: server.metric("http_requests_total", **labels) == len(PROMPTS))  # once they are sent
    assert server.metric("lightwell_generation_tokens_total") == 12 * len(PROMPTS)
    assert server.metric("lightwell_detokenizer_seconds_count") == len(PROMPTS)


def test_all_processes_answer(start_server: StartServer) -> None:
    """Also an OpenAI client, and requests that only the coordinator can answer. SIGTERM ends nothing too early."""
    server = start_server(THREE)
    streams = start_streams(server, 9, max_tokens=150)
    assert len(num_connections(server)) == 3
    assert min(num_connections(server)) >= 1
    assert max(num_connections(server)) < 9
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        response = client.responses.create(model=MODEL, input="hi", max_output_tokens=16)
        again = client.responses.create(
            model=MODEL, input="and?", max_output_tokens=16, previous_response_id=response.id
        )
        assert client.responses.retrieve(again.id).output_text == again.output_text
        deltas = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True, max_completion_tokens=8
        )
        assert [chunk.choices[0].finish_reason for chunk in deltas][-1] in ("length", "stop")
    server.signal(signal.SIGTERM)
    for stream in streams:
        assert stream.result().is_complete
    assert server.wait(60) == 0, server.end_of_log()


def test_a_request_is_cancelled_wherever_it_runs(start_server: StartServer) -> None:
    server = start_server(THREE)
    streams = start_streams(server, 6, max_tokens=4000)
    for stream in streams:
        assert server.http.post(f"/v1/requests/{stream.chunks[0]['id']}/cancel").status_code == 200
    for stream in streams:
        assert stream.result().chunks[-1]["choices"][0]["finish_reason"] == "abort"
    wait_until(lambda: server.is_idle)


def test_the_engine_dies(start_server: StartServer) -> None:
    """Streams end with an error in all processes, which use the next engine."""
    server = start_server(THREE)
    streams = start_streams(server, 6, max_tokens=4000)
    kill_engine(server)
    for stream in streams:
        error = stream.result().error
        assert error is not None
        assert error["code"] == "engine_unavailable"
    with ThreadPoolExecutor(6) as pool:  # they wait for it
        statuses = list(pool.map(lambda _: server.complete(max_tokens=3).status_code, range(6)))
    assert statuses == [200] * 6


def test_the_end_of_one_ends_the_server(start_server: StartServer) -> None:
    server = start_server(THREE)
    worker = max(children_of(server, "server.main"), key=lambda each: each.pid)
    worker.send_signal(signal.SIGKILL)
    assert server.wait(30) == 1
    assert server.end_of_log(1).endswith("the API 2 process was killed by SIGKILL")
