"""Steps and requests over real sockets, with a fake engine. What the real one records is tested in tests/e2e."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import pytest

from engine.shared.records import StepInfo
from server.api.inspection import routes
from server.api.inspection.access import RecordAccess
from server.api.inspection.schemas import StepView
from server.api.inspection.trace import MAX_QUESTIONS, STEPS_AT_A_TIME
from server.api.inspection.views import step_view
from tests.server.conftest import StartServer
from tests.support.chrome_trace import check_trace, requests_in, slices_named
from tests.support.fake_engine import FakeEngine
from tests.support.records import example_step
from tests.support.serving import RunningServer, check_error, wait_until

REQUEST = {"model": "tiny", "prompt": "abcd", "max_tokens": 1000, "stream": True}


def get(server: RunningServer, path: str, key: str = "") -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{server.url}/lightwell/v1/{path}", headers=headers)


def data(server: RunningServer, path: str, key: str = "") -> list[dict[str, Any]]:
    response = get(server, path, key)
    assert response.status_code == 200, response.text
    entries: list[dict[str, Any]] = response.json()["data"]
    return entries


@pytest.fixture
def streams() -> Iterator[list[httpx.Response]]:
    """Streams that are closed at the end."""
    opened: list[httpx.Response] = []
    yield opened
    for stream in opened:
        stream.close()


def start(server: RunningServer, streams: list[httpx.Response], name: str, key: str = "", **fields: Any) -> None:
    """Start a stream with the x-request-id `name`, and wait until the engine has it."""
    server.engine.config.endless, server.engine.config.step_seconds = True, 0.01
    num_choices = server.engine.num_choices
    headers = {"x-request-id": name} | ({"authorization": f"Bearer {key}"} if key else {})
    client = httpx.Client(timeout=20)
    request = client.build_request("POST", server.url + "/v1/completions", json=REQUEST | fields, headers=headers)
    streams.append(client.send(request, stream=True))
    wait_until(lambda: server.engine.num_choices > num_choices)


def test_a_step(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.steps = [example_step()]
    answer = get(server, "steps").json()
    (step,) = answer.pop("data")
    assert answer.pop("engine") == f"{server.context.created}-0"
    assert answer == {"object": "list", "num_blocks": 256, "num_lost": 0, "has_more": False}
    assert step.pop("started") == pytest.approx(time.time() - time.monotonic() + 1, abs=60)
    row = {
        **{"id": "of-", "prompt": 0, "index": 1, "key": None, "position": 40, "num_tokens": 3, "kind": "generated"},
        **{"num_generated": 2, "num_drafts": 2, "num_accepted": 1},
    }
    assert step == {
        **{"id": 7, "seconds": {"forward": 0.5}, "num_running": 2, "num_waiting": 1, "num_blocks_used": 3},
        "rows": [row],
    }


def test_rows_of_other_clients_have_no_names(keyed: RunningServer) -> None:
    server, fake_engine = keyed, keyed.engine
    fake_engine.config.steps = [example_step(tenants=("key-1", "key-2"))]
    for key, names in (
        ("key-a", ["of-key-1", None]),
        ("key-b", [None, "of-key-2"]),
        ("root", ["of-key-1", "of-key-2"]),
    ):
        (step,) = data(server, "steps", key)
        assert [row["id"] for row in step["rows"]] == names
        for row in step["rows"]:
            hidden = {row["prompt"], row["index"], row["key"], row["position"]}
            assert (hidden == {None}) == (row["id"] is None)
            assert row["num_tokens"] == 3
    for key, own in (("key-a", "key-1"), ("key-b", "key-2")):
        others = {"key-1", "key-2"} - {own}
        assert not any(other in get(server, "steps", key).text for other in others)


def test_requests(server: RunningServer, streams: list[httpx.Response]) -> None:
    start(server, streams, "mine", n=2)
    choices = data(server, "requests")
    assert [(choice["index"], choice["state"], choice["key"]) for choice in choices] == [
        (0, "running", None),
        (1, "running", None),
    ]
    assert all(choice["other_ids"] == ["mine"] and choice["model"] == "tiny" for choice in choices)
    for id in ("mine", choices[0]["id"]):
        request = get(server, f"requests/{id}").json()
        assert request["id"] == choices[0]["id"]
        assert [choice["index"] for choice in request["choices"]] == [0, 1]
        for choice in request["choices"]:
            assert sum(choice["seconds"].values()) == pytest.approx(choice["wall_s"])
            assert choice["prefix"]["result"] == "new"
            assert choice["chunks"] == [{"step": 1, "position": 0, "num_tokens": 4}]
    error = check_error(get(server, "requests/other"), 404)
    assert error["code"] == "request_not_found"


def test_a_client_sees_its_own_requests(keyed: RunningServer, streams: list[httpx.Response]) -> None:
    server = keyed
    for name, key in (("one", "key-a"), ("two", "key-b"), ("same", "key-a"), ("same", "key-b")):
        start(server, streams, name, key)
    for path, key, expected in (
        ("requests", "key-a", ["one", "same"]),
        ("requests", "key-b", ["same", "two"]),
        ("requests", "root", ["one", "same", "same", "two"]),
        ("requests?key=key-2", "root", ["same", "two"]),
        ("requests?key=key-2", "key-a", []),
        ("requests?key=key-1", "key-a", ["one", "same"]),
        ("requests?key=nobody", "root", []),
    ):
        assert sorted(choice["other_ids"][0] for choice in data(server, path, key)) == expected
    assert {choice["key"] for choice in data(server, "requests", "root")} == {"key-1", "key-2"}
    check_error(get(server, "requests/two", "key-a"), 404)
    ids = [get(server, "requests/same", key).json()["id"] for key in ("key-a", "key-b")]
    assert ids[0] != ids[1]
    check_error(get(server, f"requests/{ids[1]}", "key-a"), 404)
    assert get(server, f"requests/{ids[1]}", "root").json()["id"] == ids[1]


def test_the_queue(keyed: RunningServer) -> None:
    server, fake_engine = keyed, keyed.engine
    fake_engine.pause()
    body = REQUEST | {"max_tokens": 1, "stream": False}
    with ThreadPoolExecutor() as threads:
        for num_before, key in enumerate(("key-b", "key-a")):
            headers = {"authorization": f"Bearer {key}"}
            threads.submit(httpx.post, server.url + "/v1/completions", json=body, headers=headers)
            wait_until(lambda num=num_before: fake_engine.num_choices > num)
        check_queue(server)
        fake_engine.resume()


def check_queue(server: RunningServer) -> None:
    """Check that a choice of key-b waits, and one of key-a after it."""
    for key, keys in (("key-a", [None, "key-1"]), ("key-b", ["key-2", None]), ("root", ["key-2", "key-1"])):
        queue = data(server, "queue", key)
        assert [choice["key"] for choice in queue] == keys
        assert [choice["id"] is None for choice in queue] == [name is None for name in keys]
        assert [choice["num_ahead"] for choice in queue] == [0, 1]
        assert all(choice["waited"] > 0 and choice["num_tokens"] == 4 for choice in queue)
    limited = get(server, "queue?limit=1", "root").json()
    assert (limited["num_waiting"], len(limited["data"])) == (2, 1)


def test_blocks(keyed: RunningServer, streams: list[httpx.Response]) -> None:
    server = keyed
    for name, key in (("one", "key-a"), ("two", "key-b")):
        start(server, streams, name, key)
    ids = {key: get(server, "requests", key).json()["data"][0]["id"] for key in ("key-a", "key-b")}
    for key, owned in (("key-a", ["key-1", None]), ("key-b", [None, "key-2"]), ("root", ["key-1", "key-2"])):
        blocks = get(server, "blocks", key).json()
        runs, owners = blocks.pop("data"), blocks.pop("owners")
        assert blocks == {
            "object": "list",
            "engine": f"{server.context.created}-0",
            "block_size": 32,
            "num_blocks": 4,
            "num_used": 2,
            "has_more": False,
            "groups": [{"num_layers": 2, "window": None}],
        }
        assert [run["state"] for run in runs] == ["held", "held", "cached", "unused"]
        assert [None if run["owner"] is None else owners[run["owner"]]["key"] for run in runs[:2]] == owned
        assert [run["position"] for run in runs[:2]] == [None if name is None else 32 for name in owned]
        assert [owner["id"] for owner in owners] == [ids[f"key-{'ab'[int(name[-1]) - 1]}"] for name in owned if name]
        assert runs[2:] == [
            {"start": start, "num_blocks": 1, "state": state, "num_holders": 0, "is_cached": state == "cached"}
            | {"owner": None, "group": None, "position": None, "age": age}
            for start, state, age in ((2, "cached", 9), (3, "unused", None))
        ]
    assert get(server, "blocks?start=1&limit=2", "root").json()["has_more"]
    assert not get(server, "blocks?start=2&limit=2", "root").json()["has_more"]


def test_without_keys_there_are_none_to_filter_by(server: RunningServer, streams: list[httpx.Response]) -> None:
    start(server, streams, "mine")
    assert data(server, "requests?key=127.0.0.1") == []
    assert "127.0.0.1" not in get(server, "requests").text


def test_embeddings_are_found_by_their_x_request_id(server: RunningServer, fake_engine: FakeEngine) -> None:
    body = {"model": "tiny", "input": ["a", "b"]}
    assert httpx.post(f"{server.url}/v1/embeddings", json=body, headers={"x-request-id": "e"}).status_code == 200
    assert [(submit.ids, submit.prompt) for submit in fake_engine.submits] == [(("e",), 0), (("e",), 1)]


BAD_QUERIES = (
    *("steps?after=-1", "steps?after=x", "steps?after=1e3", f"steps?after={1 << 64}", "steps?limit=0"),
    *("steps?limit=1025", "requests?limit=1025", "queue?limit=1025", "blocks?start=-1", "blocks?limit=0"),
    *("blocks?limit=16385", "requests?state=done"),
    *(f"trace?seconds={value}" for value in ("0", "-1", "601", "nan", "inf", "x")),
)


def test_bad_parameters(server: RunningServer) -> None:
    for path in BAD_QUERIES:
        error, param = check_error(get(server, path), 400), path.partition("?")[2].partition("=")[0]
        assert error["param"] == param, path
        assert param in error["message"] or "Supported values" in error["message"]


def test_large_answers_count_in_the_memory_limit(start_server: StartServer, fake_engine: FakeEngine) -> None:
    server = start_server(max_buffered_bytes=1 << 20)
    for num_rows, status in ((100, 200), (8000, 400)):
        fake_engine.config.steps = [example_step(tenants=("",) * num_rows)]
        assert get(server, "steps").status_code == status
        wait_until(lambda: server.context.answers.num_bytes == 0)  # it is counted until it has been sent


def test_other_requests_are_served_while_an_answer_is_made(
    server: RunningServer, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, may_end = threading.Event(), threading.Event()

    def slow(access: RecordAccess, step: StepInfo) -> StepView:
        began.set()
        assert may_end.wait(20)
        return step_view(access, step)

    monkeypatch.setattr(routes, "step_view", slow)
    fake_engine.config.steps = [example_step()]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(get, server, "steps")
        assert began.wait(20)
        try:
            assert httpx.get(server.url + "/health", timeout=10).status_code == 200
        finally:
            may_end.set()
        assert answer.result().status_code == 200


# Traces.


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


def steps_in(trace: dict[str, Any]) -> list[int]:
    return [event["args"]["id"] for event in slices_named(trace, "step")]


def test_the_last_seconds(server: RunningServer, fake_engine: FakeEngine, streams: list[httpx.Response]) -> None:
    record_steps(fake_engine, 3, time.monotonic() - 100)
    fake_engine.config.steps += [msgspec.structs.replace(example_step(4), started=time.monotonic() - 1)]
    start(server, streams, "mine")
    for path, expected in (("trace?seconds=60", [4]), ("trace?seconds=600", [1, 2, 3, 4])):
        trace = read(server, path)
        assert steps_in(trace) == expected
        ((whole, *_),) = requests_in(trace)
        assert whole["args"]["state"] in ("waiting", "running")
        assert trace["otherData"] == {"engine": f"{server.context.created}-0", "is_complete": True}
        assert trace["displayTimeUnit"] == "ms"


def test_more_steps_than_fit_into_one_answer(server: RunningServer, fake_engine: FakeEngine) -> None:
    num_steps = 2 * STEPS_AT_A_TIME + 3
    record_steps(fake_engine, num_steps, time.monotonic() - 5)
    trace = read(server, "trace?seconds=600")
    assert steps_in(trace) == list(range(1, num_steps + 1))
    assert trace["otherData"]["is_complete"]
    record_steps(fake_engine, MAX_QUESTIONS * STEPS_AT_A_TIME + 1, time.monotonic() - 8)
    trace = read(server, "trace?seconds=600")
    assert len(steps_in(trace)) == MAX_QUESTIONS * STEPS_AT_A_TIME
    assert not trace["otherData"]["is_complete"]


def test_the_trace_of_a_request(server: RunningServer, fake_engine: FakeEngine, streams: list[httpx.Response]) -> None:
    record_steps(fake_engine, 3, time.monotonic() - 100)
    for name in ("one", "two"):
        start(server, streams, name)
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


def test_traces_show_a_client_its_own_requests(keyed: RunningServer, streams: list[httpx.Response]) -> None:
    step = msgspec.structs.replace(example_step(tenants=("key-1", "key-2")), started=time.monotonic())
    keyed.engine.config.steps = [step]
    for name, key in (("one", "key-a"), ("two", "key-b")):
        start(keyed, streams, name, key)
    for key, names in (("key-a", ["key-1"]), ("key-b", ["key-2"]), ("root", ["key-1", "key-2"])):
        trace = read(keyed, "trace?seconds=600", key)
        assert [slices[0]["args"]["key"] for slices in requests_in(trace)] == names
        (whole,) = slices_named(trace, "step")
        assert (whole["args"]["choices"], whole["args"]["generated_tokens"]) == (2, 4)
        hidden = {"key-1", "key-2"} - set(names)
        assert not any(name in get(keyed, "trace", key).text for name in hidden)
    check_error(get(keyed, "requests/two/trace", "key-a"), 404)
    read(keyed, "requests/two/trace", "root")
    check_error(get(keyed, "trace"), 401)
