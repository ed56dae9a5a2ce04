"""Background streams of `/v1/responses`: several readers follow the logged events from any event on."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from tests.server.api.contract import RESPONSES
from tests.server.api.dialects import REPLY, RESPONSE_EVENT, text_of
from tests.server.api.responses.requests import ask, ask_events, ask_json, cancel, delete, get, parse
from tests.server.conftest import StartServer
from tests.support.clients import openai_client
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, raw_request, wait_until

STREAM = {"background": True, "stream": True}
MINIMAL: dict[str, Any] = {"model": "tiny", "input": "Hi"}


@pytest.fixture
def slow(server: RunningServer, fake_engine: FakeEngine) -> RunningServer:
    """A server that generates up to `max_output_tokens`, a token every five milliseconds."""
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.005
    return server


class Reader:
    """Reads a stream in a thread."""

    def __init__(self, url: str, method: str = "GET", body: Any = None) -> None:
        self.text = ""
        self._thread = threading.Thread(target=self._read, args=(method, url, body))
        self._thread.start()

    def _read(self, method: str, url: str, body: Any) -> None:
        with httpx.stream(method, url, json=body, timeout=60) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            for text in response.iter_text():
                self.text += text

    def join(self) -> str:
        self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "the stream does not end"
        return self.text


def url(server: RunningServer, response_id: str, starting_after: int | None = None) -> str:
    rest = "" if starting_after is None else f"&starting_after={starting_after}"
    return f"{server.url}{RESPONSES}/{response_id}?stream=true{rest}"


def check_gone(text: str) -> None:
    """Check the end of a stream whose response is deleted: a reader that is behind gets only an error."""
    last: dict[str, Any] = json.loads(text.rpartition("\ndata: ")[2])
    RESPONSE_EVENT.validate_python(last)
    assert last["type"] in ("response.failed", "error")
    error = last if last["type"] == "error" else last["response"]["error"]
    assert "is no longer stored" in error["message"]


@contextmanager
def begun(server: RunningServer, **fields: Any) -> Iterator[str]:
    """Yield the id of a background response whose client has read its first events and disconnects at exit."""
    with httpx.stream("POST", server.url + RESPONSES, json=MINIMAL | STREAM | fields, timeout=20) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["x-lightwell-seed"]
        line = next(line for line in response.iter_lines() if line.startswith("data: "))
        yield json.loads(line.removeprefix("data: "))["response"]["id"]


def is_done(server: RunningServer, response_id: str) -> bool:
    return bool(get(server, response_id).json()["status"] != "in_progress")


def wait_idle(server: RunningServer) -> None:
    wait_until(lambda: server.engine.num_choices == 0 and not server.context.background_tasks)


# Events.


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop ids and numbers and join the deltas of a text, which depend on how the engine's steps arrive."""
    found: list[dict[str, Any]] = []
    for event in events:
        text = re.sub(r'"(resp|msg)_[0-9a-f]{32}"', "null", json.dumps(event | {"sequence_number": 0}))
        if found and "delta" in event and found[-1]["type"] == event["type"]:
            found[-1]["delta"] += event["delta"]
        else:
            found.append(json.loads(text))
    return found


def test_the_events_are_those_of_any_stream(server: RunningServer) -> None:
    kept, other = ask_events(server, background=True), ask_events(server)
    for event in [*kept, *other]:
        if "response" in event:
            event["response"]["background"] = event["response"]["created_at"] = None
    assert joined(kept) == joined(other)
    assert text_of(kept[-1]["response"]) == REPLY
    stored = get(server, kept[-1]["response"]["id"]).json()
    assert (stored["status"], stored["output"]) == ("completed", kept[-1]["response"]["output"])


def test_logged_events_can_be_read_from_any_event_on(server: RunningServer) -> None:
    text = ask(server, **STREAM).text
    events = text.split("\n\n")[:-1]
    response_id = parse(text)[0]["response"]["id"]
    assert httpx.get(url(server, response_id)).text == text
    for number in range(len(events)):
        rest = httpx.get(url(server, response_id, number)).text
        assert rest == "".join(f"{event}\n\n" for event in events[number + 1 :])
    with (
        openai_client(server.url) as client,
        client.responses.stream(response_id=response_id, starting_after=3) as stream,
    ):
        assert [event.sequence_number for event in stream] == list(range(4, len(events)))
        assert stream.get_final_response().output_text == REPLY


def test_several_readers(slow: RunningServer) -> None:
    """Each reader starts at its own event, while the response is generated; late ones catch up."""
    with begun(slow, max_output_tokens=200) as response_id:
        readers: list[tuple[int | None, Reader]] = []
        for starting_after in (None, 0, 1, 2):
            readers.append((starting_after, Reader(url(slow, response_id, starting_after))))
            wait_until(lambda reader=readers[-1][1]: reader.text.count("delta") > 2)
        slow.engine.pause()
        assert not is_done(slow, response_id)
        slow.engine.resume()
        texts = [(starting_after, reader.join()) for starting_after, reader in readers]
    whole = texts[0][1]
    assert text_of(parse(whole)[-1]["response"]) == (REPLY * 20)[:200]
    for starting_after, text in texts:
        first = 0 if starting_after is None else starting_after + 1
        assert text == "".join(f"{event}\n\n" for event in whole.split("\n\n")[first:-1])


@pytest.mark.checklist("E08")
def test_a_reader_that_does_not_read(server: RunningServer, fake_engine: FakeEngine) -> None:
    """A stalled reader blocks neither the generation nor other readers, and finally gets all events."""
    fake_engine.config.endless = True
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.settimeout(60)
        stalled.connect(("127.0.0.1", server.port))
        fake_engine.pause()
        include = ["message.output_text.logprobs"]
        with begun(server, max_output_tokens=1900, include=include, top_logprobs=20) as response_id:
            path = f"{RESPONSES}/{response_id}?stream=true"
        stalled.sendall(raw_request("GET", path, connection="close"))
        fake_engine.resume()
        text = Reader(url(server, response_id)).join()
        assert len(text) > 3_000_000  # exceeds the buffers of a connection
        assert is_done(server, response_id)
        received = b""
        while data := stalled.recv(1 << 16):
            received += data
    assert unchunked(received.partition(b"\r\n\r\n")[2]).decode() == text


def unchunked(body: bytes) -> bytes:
    """Decode a chunked HTTP/1.1 body."""
    found = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        found.append(body[:length])
        body = body[length + 2 :]
    return b"".join(found)


# Ends.


def test_cancel(slow: RunningServer) -> None:
    with begun(slow) as response_id:
        readers = [Reader(url(slow, response_id)) for _ in range(2)]
        readers.append(Reader(slow.url + RESPONSES, "POST", MINIMAL | STREAM))
        wait_until(lambda: all(reader.text.count("delta") > 2 for reader in readers))
        other_id = parse(readers[2].text.partition("\n\n")[0] + "\n\n")[0]["response"]["id"]
        for each in (response_id, other_id):
            assert cancel(slow, each).json()["status"] == "cancelled"
        texts = [reader.join() for reader in readers]
    assert texts[0] == texts[1]
    for text in texts:
        *_, item_done, last = parse(text)
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
        assert last["response"]["output"] == [item_done["item"]]
        assert get(slow, last["response"]["id"]).json() == last["response"]
    assert httpx.get(url(slow, response_id)).text == texts[0]
    wait_idle(slow)


def test_cancel_before_the_first_token(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    with begun(server) as response_id:
        reader = Reader(url(server, response_id))
        wait_until(lambda: "in_progress" in reader.text)
        cancel(server, response_id)
        kinds = [event["type"] for event in parse(reader.join())]
        assert kinds == ["response.created", "response.in_progress", "response.incomplete"]


def test_delete(slow: RunningServer) -> None:
    num_bytes = slow.response_store.num_bytes
    with begun(slow) as response_id:
        reader = Reader(url(slow, response_id))
        wait_until(lambda: reader.text.count("delta") > 2)
        assert delete(slow, response_id).status_code == 200
        check_gone(reader.join())
    check_error(httpx.get(url(slow, response_id)), 404)
    wait_idle(slow)
    assert slow.response_store.num_bytes == num_bytes


# Memory limits.


def test_a_stream_that_exceeds_the_memory_limit(start_server: StartServer, fake_engine: FakeEngine) -> None:
    """A stream that exceeds the memory limit fails with an error, since nobody could read it."""
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.001
    server = start_server(stored_responses_memory=6_000)
    text = ask(server, **STREAM, max_output_tokens=1900, include=["message.output_text.logprobs"]).text
    check_gone(text)
    assert len("".join(re.findall(r'"delta":"([^"]*)"', text))) < 500  # of 1900
    wait_idle(server)
    assert server.response_store.num_bytes == 0
    response_id = parse(text.partition("\n\n")[0] + "\n\n")[0]["response"]["id"]
    check_error(get(server, f"{response_id}?stream=true"), 404)
    assert get(server, ask_json(server, max_output_tokens=5)["id"]).status_code == 200


def test_a_stream_that_makes_room_for_others(start_server: StartServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.005
    server = start_server(max_stored_responses=1)
    with begun(server) as response_id:
        reader = Reader(url(server, response_id))
        wait_until(lambda: reader.text.count("delta") > 2)
        kept = ask_json(server, max_output_tokens=5)["id"]
        check_gone(reader.join())
    wait_idle(server)
    assert get(server, kept).status_code == 200


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"max_stored_responses": 0}, {}),
        ({"stored_responses_memory": 2_000}, {"input": "x" * 2_000, "max_output_tokens": 20}),
    ],
)
def test_responses_too_large_to_store_are_not_generated(
    start_server: StartServer, fake_engine: FakeEngine, settings: dict[str, Any], fields: dict[str, Any]
) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    server = start_server(**settings)
    for stream in (False, True):
        error = check_error(ask(server, background=True, stream=stream, **fields), 400)
        assert error["param"] == "background"
        wait_until(lambda: fake_engine.num_choices == 0)
    assert get(server, ask_json(server, **({"max_output_tokens": 5} | fields))["id"]).status_code == 404


# Invalid requests.


def test_invalid_requests(server: RunningServer) -> None:
    response_id = ask_events(server, background=True)[-1]["response"]["id"]
    last = parse(httpx.get(url(server, response_id)).text)[-1]["sequence_number"]
    for query, param in (
        ("stream=maybe", "stream"),
        ("starting_after=1", "starting_after"),
        ("stream=false&starting_after=1", "starting_after"),
        *((f"stream=true&starting_after={x}", "starting_after") for x in ("-1", "x", "1.5", "", last + 1, "9" * 100)),
        ("include_obfuscation=maybe", "include_obfuscation"),
    ):
        error = check_error(get(server, f"{response_id}?{query}"), 400)
        assert (error["param"], f"'{param}'" in error["message"]) == (param, True), query
    accepted = f"{response_id}?stream=true&include_obfuscation=true&include[]=message.output_text.logprobs"
    assert get(server, accepted).text == get(server, f"{response_id}?stream=true").text
    for path in (response_id, f"{response_id}?stream=false"):
        assert get(server, path).json()["status"] == "completed"
    check_error(get(server, "resp_unknown?stream=true"), 404)


def test_streams_without_an_event_log(server: RunningServer) -> None:
    streamed = ask_events(server)[-1]["response"]["id"]
    in_background = ask_json(server, background=True)["id"]
    for response_id in (streamed, in_background, ask_json(server)["id"]):
        error = check_error(get(server, f"{response_id}?stream=true"), 400)
        assert error["param"] == "stream"
    with openai_client(server.url) as client, pytest.raises(openai.BadRequestError):
        client.responses.retrieve(streamed, stream=True)
