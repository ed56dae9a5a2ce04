"""Traces over real sockets, with a fake engine. Those of the real one are tested in tests/e2e."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest

from server.api.inspection.trace import MAX_QUESTIONS, STEPS_AT_A_TIME
from tests.server.api.inspection.test_routes import KEYS, REQUEST, get
from tests.server.conftest import StartServer
from tests.support.chrome_trace import check_trace, requests_in, slices_named
from tests.support.fake_engine import FakeEngine
from tests.support.records import example_step
from tests.support.serving import RunningServer, check_error, wait_until


@pytest.fixture(autouse=True)
def _endless(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.01


def record_steps(engine: FakeEngine, num_steps: int, started: float) -> None:
    """Record steps that begin a millisecond after each other."""
    engine.config.steps = [
        msgspec.structs.replace(example_step(number), started=started + number / 1000, seconds={"forward": 0.001})
        for number in range(1, num_steps + 1)
    ]


def read(server: RunningServer, path: str, key: str = "") -> dict[str, Any]:
    response = get(server, path, key)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    check_trace(answer)
    return answer


@contextmanager
def asking(server: RunningServer, name: str, key: str = "none") -> Iterator[None]:
    """Keep a stream with this x-request-id open."""
    num_choices = server.engine.num_choices
    headers = {"x-request-id": name, "authorization": f"Bearer {key}"}
    with httpx.stream("POST", server.url + "/v1/completions", json=REQUEST, headers=headers, timeout=20):
        wait_until(lambda: server.engine.num_choices > num_choices)
        yield


def steps_in(trace: dict[str, Any]) -> list[int]:
    return [event["args"]["id"] for event in slices_named(trace, "step")]


def test_the_last_seconds(server: RunningServer, fake_engine: FakeEngine) -> None:
    record_steps(fake_engine, 3, time.monotonic() - 100)
    fake_engine.config.steps += [msgspec.structs.replace(example_step(4), started=time.monotonic() - 1)]
    with asking(server, "mine"):
        for path, expected in (("trace", [4]), ("trace?seconds=0.5", []), ("trace?seconds=300", [1, 2, 3, 4])):
            trace = read(server, path)
            assert steps_in(trace) == expected
            ((whole, *_),) = requests_in(trace)
            assert whole["args"]["state"] in ("waiting", "running")
            assert trace["otherData"] == {"engine": f"{server.context.created}-0", "is_complete": True}
            assert trace["displayTimeUnit"] == "ms"


def test_more_steps_than_fit_into_one_answer(server: RunningServer, fake_engine: FakeEngine) -> None:
    num_steps = 2 * STEPS_AT_A_TIME + 3
    record_steps(fake_engine, num_steps, time.monotonic() - 5)
    trace = read(server, "trace")
    assert steps_in(trace) == list(range(1, num_steps + 1))
    assert trace["otherData"]["is_complete"]
    record_steps(fake_engine, MAX_QUESTIONS * STEPS_AT_A_TIME + 1, time.monotonic() - 8)
    trace = read(server, "trace")
    assert len(steps_in(trace)) == MAX_QUESTIONS * STEPS_AT_A_TIME
    assert not trace["otherData"]["is_complete"]


def test_one_request(server: RunningServer, fake_engine: FakeEngine) -> None:
    record_steps(fake_engine, 3, time.monotonic() - 100)
    with asking(server, "one"), asking(server, "two"):
        fake_engine.config.steps += [msgspec.structs.replace(example_step(4), started=time.monotonic())]
        trace = read(server, "requests/one/trace")
        ((whole, *parts),) = requests_in(trace)
        (choice,) = get(server, "requests/one").json()["choices"]
    assert steps_in(trace) == [4]
    assert whole["args"]["id"] == choice["id"]
    assert whole["args"]["model"] == "tiny"
    assert whole["dur"] <= 1e6 * choice["wall_s"]
    assert whole["ts"] == pytest.approx(1e6 * choice["arrival"], abs=2)
    assert sum(part["dur"] for part in parts if part["name"] != "chunk") == whole["dur"]
    check_error(get(server, "requests/three/trace"), 404)


def test_a_client_sees_its_own_requests(start_server: StartServer, fake_engine: FakeEngine) -> None:
    server = start_server(**KEYS)
    fake_engine.config.steps = [
        msgspec.structs.replace(example_step(tenants=("key-1", "key-2")), started=time.monotonic())
    ]
    with asking(server, "one", "key-a"), asking(server, "two", "key-b"):
        for key, names in (("key-a", ["key-1"]), ("key-b", ["key-2"]), ("root", ["key-1", "key-2"])):
            trace = read(server, "trace", key)
            assert [slices[0]["args"]["key"] for slices in requests_in(trace)] == names
            (step,) = slices_named(trace, "step")
            assert (step["args"]["choices"], step["args"]["generated_tokens"]) == (2, 4)
            hidden = {"key-1", "key-2"} - set(names)
            assert not any(name in get(server, "trace", key).text for name in hidden)
        check_error(get(server, "requests/two/trace", "key-a"), 404)
        read(server, "requests/two/trace", "root")
    check_error(get(server, "trace"), 401)


@pytest.mark.parametrize("seconds", ["0", "-1", "601", "nan", "inf", "x"])
def test_bad_parameters(server: RunningServer, seconds: str) -> None:
    assert check_error(get(server, f"trace?seconds={seconds}"), 400)["param"] == "seconds"


@pytest.mark.parametrize("path", ["trace", "requests/mine/trace"])
def test_who_may_not_read(start_server: StartServer, path: str) -> None:
    check_error(get(start_server(inspect=False), path), 404)
    check_error(get(start_server(allowed_origins=("*",)), path), 403)
