"""The stream of steps over real sockets, with a fake engine whose records the tests write."""

import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from engine.shared.messages import Submit
from engine.shared.records import ReadSteps
from server.api.inspection.events import INTERVAL, MAX_READERS_EACH
from tests.server.conftest import StartServer
from tests.support.fake_engine import FakeEngine
from tests.support.records import example_step
from tests.support.serving import RunningServer, check_error, fresh_server, wait_until

PATH = "/lightwell/v1/events"
Event = tuple[str, dict[str, Any]]
KEPT = 3  # steps of an engine with a small record


@contextmanager
def following(server: RunningServer, **headers: str) -> Iterator[Iterator[Event]]:
    """Yield the ids and the data of the events as they come."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    with httpx.stream("GET", server.url + PATH, headers=fields, timeout=20) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield _parse(response.iter_lines())


def _parse(lines: Iterator[str]) -> Iterator[Event]:
    event_id = ""
    for line in lines:
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        elif line.startswith("data: "):
            yield event_id.strip(), json.loads(line.removeprefix("data: "))


def run_step(server: RunningServer, engine: FakeEngine, step_id: int, tenants: tuple[str, ...] = ("",)) -> None:
    """Record a step, and let the engine report that it has run one."""
    engine.config.steps = [*engine.config.steps, example_step(step_id, tenants)]
    key = "key-a" if server.context.settings.needs_key else "none"
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    headers = {"authorization": f"Bearer {key}"}
    assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == 200


def ids(event: Event) -> list[int]:
    return [step["id"] for step in event[1]["data"]]


def num_readers(server: RunningServer) -> int:
    return server.context.num_step_readers.total()


def test_steps_from_now_on(server: RunningServer, fake_engine: FakeEngine) -> None:
    run_step(server, fake_engine, 1)
    with following(server) as events:
        run_step(server, fake_engine, 2)
        first = next(events)
        run_step(server, fake_engine, 3)
        second = next(events)
    assert (ids(first), ids(second)) == ([2], [3])
    assert second[0] == f"{server.context.created}-0-3"
    assert second[1]["engine"] == f"{server.context.created}-0"
    wait_until(lambda: num_readers(server) == 0)


def test_going_on_after_an_event(server: RunningServer, fake_engine: FakeEngine) -> None:
    for step_id in (1, 2, 3):
        run_step(server, fake_engine, step_id)
    for last, expected in ((f"{server.context.created}-0-2", [3]), ("1-0-2", [1, 2, 3]), ("1-7-99", [1, 2, 3])):
        with following(server, last_event_id=last) as events:
            assert ids(next(events)) == expected
    for bad in ("2", "x", "1-2", "-1-0-1", "1-0-1²"):
        response = httpx.get(server.url + PATH, headers={b"last-event-id": bad.encode("latin-1")})
        assert check_error(response, 400)["param"] == "last-event-id"


def test_a_reader_that_stalls_is_told_what_it_has_lost(server: RunningServer, fake_engine: FakeEngine) -> None:
    """Nothing is stored for it: once the connection is full, the engine is not asked until the client reads on."""

    def run_large_steps(num_steps: int) -> int:
        """Return how often the engine has been asked meanwhile."""
        num_asked = num_questions(fake_engine)
        for _ in range(num_steps):
            run_step(server, fake_engine, next(step_ids), tenants=("",) * 4000)
            fake_engine.config.steps = fake_engine.config.steps[-KEPT:]
            server.turn(2 * INTERVAL)
        return num_questions(fake_engine) - num_asked

    step_ids = count(1)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        wait_until(lambda: num_readers(server) == 1)
        while run_large_steps(10):
            assert fake_engine.config.steps[-1].step_id < 400
        assert run_large_steps(2 * KEPT) == 0
        connection.settimeout(60)
        with connection.makefile("rb") as stream:
            events = _parse(line.decode() for line in stream)
            check_gaps(events, last=fake_engine.config.steps[-1].step_id)


def check_gaps(events: Iterator[Event], last: int) -> None:
    """Check that all steps until the last one are there or counted as lost, and that some are lost."""
    position, num_lost = 0, 0
    while position < last:
        event = next(events)
        assert ids(event)[0] == position + event[1]["num_lost"] + 1
        num_lost += event[1]["num_lost"]
        position = ids(event)[-1]
        assert event[0].endswith(f"-{position}")
    assert position == last
    assert num_lost >= KEPT


def num_questions(engine: FakeEngine) -> int:
    return sum(isinstance(message, ReadSteps) for message in list(engine.received))


def test_an_idle_engine_is_not_asked(server: RunningServer, fake_engine: FakeEngine) -> None:
    with following(server) as events:
        run_step(server, fake_engine, 1)
        next(events)
        server.turn(INTERVAL)
        num_received = len(fake_engine.received)
        for _ in range(10):
            server.turn(INTERVAL)
        run_step(server, fake_engine, 2)  # of which the engine learns after what it has been asked
        new = fake_engine.received[num_received:]
        assert sum(isinstance(message, ReadSteps) for message in new[: [*map(type, new)].index(Submit)]) == 0


def test_rows_of_other_clients_have_no_names(keyed: RunningServer) -> None:
    server, fake_engine = keyed, keyed.engine
    with following(server, authorization="Bearer key-b") as events:
        run_step(server, fake_engine, 1, tenants=("key-1", "key-2"))
        (step,) = next(events)[1]["data"]
    assert [row["id"] for row in step["rows"]] == [None, "of-key-2"]
    assert httpx.get(server.url + PATH).status_code == 401


def test_a_stream_follows_the_keys_file(start_server: StartServer, fake_engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    own, other = (hashlib.sha256(key.encode()).hexdigest() for key in ("key-b", "key-c"))

    def write(server: RunningServer | None, **fields: object) -> None:
        file.write_text(json.dumps({"team": {"keys": [other, own], **fields}}))
        if server is not None:
            server.context.api_keys.reload()

    write(None, admin=True)
    server = start_server(api_key=("key-a",), api_keys_file=str(file))
    with following(server, authorization="Bearer key-b") as events:
        run_step(server, fake_engine, 1, tenants=("key-1", "team"))
        assert shown(next(events)) == ["of-key-1", "of-team"]
        write(server)
        run_step(server, fake_engine, 2, tenants=("key-1", "team"))
        assert shown(next(events)) == [None, "of-team"]
        write(server, keys=other)
        assert [event[1]["error"]["code"] for event in events] == ["invalid_api_key"]
    wait_until(lambda: not server.context.num_step_readers)


def shown(event: Event) -> list[str | None]:
    return [row["id"] for step in event[1]["data"] for row in step["rows"]]


def test_the_number_of_streams_is_limited(server: RunningServer) -> None:
    with httpx.Client() as client:
        opened = [client.send(client.build_request("GET", server.url + PATH), stream=True) for _ in range(8)]
        assert len(opened) == MAX_READERS_EACH == num_readers(server)
        assert check_error(httpx.get(server.url + PATH), 429)["code"] == "rate_limit_exceeded"
        for response in opened:
            response.close()
    wait_until(lambda: not server.context.num_step_readers)
    with following(server):
        assert num_readers(server) == 1


def test_it_ends_when_the_server_shuts_down(model_folder: Path) -> None:
    with fresh_server(model_folder) as server, following(server) as events:
        run_step(server, server.engine, 1)
        next(events)
        server.model.client.drain_requested.set()
        assert list(events) == []
