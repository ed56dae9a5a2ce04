"""`/lightwell/v1/` over real sockets, with a fake engine. What the real one records is tested in tests/e2e."""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.parts.inspection.reader import stages
from engine.parts.inspection.records import ChunkView, InspectionProblem
from engine.scheduling.record import RequestRecord
from engine.shared.messages import Ask, Submit
from server.generation.generation import stage_spans
from server.parts.inspection.access import RecordAccess
from server.parts.inspection.inspect import MAX_POSITIONS
from server.parts.inspection.part import INTERVAL, MAX_READERS_EACH, StepReaders
from server.parts.inspection.trace import MAX_QUESTIONS, STEPS_AT_A_TIME, Trace, TraceBuilder, TraceInfo
from tests.server.conftest import StartServer
from tests.support.chrome_trace import check_trace, requests_in, slices_named, tracks
from tests.support.clients import COMPLETIONS, write_keys_file
from tests.support.fake_engine import FakeEngine
from tests.support.records import example_step, make
from tests.support.serving import RunningServer, check_error, fresh_server, wait_until
from tests.support.submits import new_submit

Fields = dict[str, str]

REQUEST = {"model": "tiny", "prompt": "abcd", "max_tokens": 1000, "stream": True}


def auth(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def fields_of(headers: Fields) -> Fields:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def get(server: RunningServer, path: str, key: str = "", **headers: str) -> httpx.Response:
    return httpx.get(f"{server.url}/lightwell/v1/{path}", headers=auth(key) | fields_of(headers))


def data(server: RunningServer, path: str, key: str = "") -> Any:
    return get(server, path, key).raise_for_status().json()["data"]


@pytest.fixture
def streams() -> Iterator[ExitStack]:
    """What closes streams at the end."""
    with ExitStack() as stack:
        yield stack


def start(server: RunningServer, streams: ExitStack, name: str, key: str = "", **fields: Any) -> None:
    """Start a stream with the x-request-id `name`, and wait until the engine has it."""
    server.engine.config.endless, server.engine.config.step_seconds = True, 0.01
    num_choices, headers = server.engine.num_choices, {"x-request-id": name} | auth(key)
    url, body = server.url + COMPLETIONS, REQUEST | fields
    streams.enter_context(httpx.stream("POST", url, json=body, headers=headers, timeout=20))
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
    counts = {"num_running": 2, "num_waiting": 1, "num_blocks_used": 3}
    assert step == {"id": 7, "seconds": {"forward": 0.5}, "rows": [row], **counts}


def test_requests(server: RunningServer, streams: ExitStack) -> None:
    start(server, streams, "mine", n=2)
    choices = data(server, "requests")
    for number, choice in enumerate(choices):
        assert (choice["index"], choice["state"], choice["key"]) == (number, "running", None)
        assert (choice["other_ids"], choice["model"]) == (["mine"], "tiny")
    for id in ("mine", choices[0]["id"]):
        request = get(server, f"requests/{id}").json()
        assert request["id"] == choices[0]["id"]
        assert [choice["index"] for choice in request["choices"]] == [0, 1]
        for choice in request["choices"]:
            assert sum(choice["seconds"].values()) == pytest.approx(choice["wall_s"])
            assert choice["prefix"]["result"] == "new"
            assert choice["chunks"] == [{"step": 1, "position": 0, "num_tokens": 4}]
    assert check_error(get(server, "requests/other"), 404)["code"] == "request_not_found"


# Key -> the names in records of key-1 and key-2 that its client sees.
SEEN: list[tuple[str, list[str | None]]]
SEEN = [("key-a", ["key-1", None]), ("key-b", [None, "key-2"]), ("root", ["key-1", "key-2"])]


def test_what_a_client_sees(keyed: RunningServer, streams: ExitStack) -> None:
    keyed.engine.config.steps = [example_step(tenants=("key-1", "key-2"), started=time.monotonic())]
    for name, key in (("one", "key-a"), ("two", "key-b"), ("same", "key-a"), ("same", "key-b")):
        start(keyed, streams, name, key)
    for key, names in SEEN:
        rows = data(keyed, "steps", key)[0]["rows"]
        assert [row["key"] for row in rows] == names
        for row in rows:
            assert ({row[name] for name in ("id", "prompt", "index", "position")} == {None}) == (row["key"] is None)
            assert row["num_tokens"] == 3
        assert {choice["key"] for choice in data(keyed, "requests", key)} == set(names) - {None}
        trace = read(keyed, "trace?seconds=600", key)
        assert {slices[0]["args"]["key"] for slices in requests_in(trace)} == set(names) - {None}
        (whole,) = slices_named(trace, "step")
        assert (whole["args"]["choices"], whole["args"]["generated_tokens"]) == (2, 4)
        for path in ("steps", "requests", "trace"):
            assert [name in get(keyed, path, key).text for name in ("key-1", "key-2")] == [*map(bool, names)]
    found = {("key-2", "root"): ["same", "two"], ("key-2", "key-a"): [], ("key-1", "key-a"): ["one", "same"]}
    for (name, key), expected in (found | {("nobody", "root"): []}).items():
        assert sorted(choice["other_ids"][0] for choice in data(keyed, f"requests?key={name}", key)) == expected
    ids = [get(keyed, "requests/same", key).json()["id"] for key in ("key-a", "key-b")]
    assert get(keyed, f"requests/{ids[1]}", "root").json()["id"] == ids[1] != ids[0]
    for path in ("requests/two", f"requests/{ids[1]}", "requests/two/trace"):
        check_error(get(keyed, path, "key-a"), 404)
    read(keyed, "requests/two/trace", "root")


def test_the_queue(keyed: RunningServer, threads: ThreadPoolExecutor) -> None:
    """A choice of key-b waits, and one of key-a after it."""
    keyed.engine.pause()
    body = REQUEST | {"max_tokens": 1, "stream": False}
    for num_before, key in enumerate(("key-b", "key-a")):
        threads.submit(httpx.post, keyed.url + COMPLETIONS, json=body, headers=auth(key))
        wait_until(lambda num=num_before: keyed.engine.num_choices > num)
    for key, names in SEEN:
        queue = data(keyed, "queue", key)
        assert [choice["key"] for choice in queue] == names[::-1]
        assert [choice["id"] is None for choice in queue] == [name is None for name in names[::-1]]
        assert [choice["num_ahead"] for choice in queue] == [0, 1]
        assert all(choice["waited"] > 0 and choice["num_tokens"] == 4 for choice in queue)
    limited = get(keyed, "queue?limit=1", "root").json()
    assert (limited["num_waiting"], len(limited["data"])) == (2, 1)
    keyed.engine.resume()


def test_blocks(keyed: RunningServer, streams: ExitStack) -> None:
    for name, key in (("one", "key-a"), ("two", "key-b")):
        start(keyed, streams, name, key)
    ids = {choice["key"]: choice["id"] for choice in data(keyed, "requests", "root")}
    for key, names in SEEN:
        blocks = get(keyed, "blocks", key).json()
        runs, owners = blocks["data"], blocks["owners"]
        assert (blocks["block_size"], blocks["num_blocks"], blocks["num_used"], blocks["has_more"]) == (32, 4, 2, False)
        assert [run["state"] for run in runs] == ["held", "held", "cached", "unused"]
        assert [None if run["owner"] is None else owners[run["owner"]]["key"] for run in runs[:2]] == names
        assert [run["position"] for run in runs[:2]] == [None if name is None else 32 for name in names]
        assert [owner["id"] for owner in owners] == [ids[name] for name in names if name]
        for run, number, age in ((runs[2], 2, 9), (runs[3], 3, None)):
            assert (run["start"], run["num_blocks"], run["num_holders"], run["owner"]) == (number, 1, 0, None)
            assert (run["is_cached"], run["age"]) == (number == 2, age)
    assert [get(keyed, f"blocks?start={n}&limit=2", "root").json()["has_more"] for n in (1, 2)] == [True, False]


def test_without_keys_there_are_none_to_filter_by(server: RunningServer, streams: ExitStack) -> None:
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


def test_answers_are_made_in_threads(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that other requests are served meanwhile."""
    threads: list[str] = []
    monkeypatch.setattr(RecordAccess, "show_choice", lambda *_: threads.append(threading.current_thread().name))
    server.engine.config.steps = [example_step()]
    data(server, "steps")
    assert threads
    assert "server" not in threads  # the thread of the event loop


# Traces.


def record_steps(engine: FakeEngine, num_steps: int, started: float) -> None:
    """Record steps that begin a millisecond after each other."""
    steps = (example_step(n, started=started + n / 1000, seconds={"forward": 0.001}) for n in range(1, num_steps + 1))
    engine.config.steps = list(steps)


def read(server: RunningServer, path: str, key: str = "") -> dict[str, Any]:
    answer: dict[str, Any] = get(server, path, key).raise_for_status().json()
    check_trace(answer)
    return answer


def steps_in(trace: dict[str, Any]) -> list[int]:
    return [event["args"]["id"] for event in slices_named(trace, "step")]


def test_traces(server: RunningServer, fake_engine: FakeEngine, streams: ExitStack) -> None:
    """Of the last seconds, and of a request."""
    record_steps(fake_engine, 3, time.monotonic() - 100)
    for name in ("one", "two"):
        start(server, streams, name)
    fake_engine.config.steps += [example_step(4, started=time.monotonic())]
    expected = {"trace?seconds=60": ([4], 2), "trace?seconds=600": ([1, 2, 3, 4], 2), "requests/one/trace": ([4], 1)}
    for path, (steps, num_requests) in expected.items():
        trace = read(server, path)
        assert steps_in(trace) == steps
        assert [slices[0]["args"]["state"] for slices in requests_in(trace)] == ["running"] * num_requests
        assert trace["otherData"] == {"engine": f"{server.context.created}-0", "is_complete": True}
        assert trace["displayTimeUnit"] == "ms"
    ((whole, *parts),) = requests_in(trace)
    (choice,) = get(server, "requests/one").json()["choices"]
    assert (whole["args"]["id"], whole["args"]["model"]) == (choice["id"], "tiny")
    assert whole["dur"] <= 1e6 * choice["wall_s"]
    assert whole["ts"] == pytest.approx(1e6 * choice["arrival"], abs=2)
    assert sum(part["dur"] for part in parts if part["name"] != "chunk") == whole["dur"]
    check_error(get(server, "requests/three/trace"), 404)


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


# Inspections. What they show is tested with the real engine.


A: dict[str, Any] = {"token_id": 97, "token": "a"}
B: dict[str, Any] = {"token_id": 98, "token": "b"}


def inspect(server: RunningServer, key: str = "", **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/lightwell/v1/inspect", json=body, headers=auth(key))


def test_numbers_that_fit_into_no_message(server: RunningServer) -> None:
    for name in ("start", "end", "index", "prompt_index", "layer", "head"):
        body: dict[str, Any] = {"prompt": "ab", name: 10**30}
        assert check_error(inspect(server, **body), 400)["param"] == name
    assert inspect(server, prompt="ab").status_code == 200


def test_an_inspection_of_a_prompt(server: RunningServer) -> None:
    response = inspect(server, prompt="ab", layer=1, head=0)
    assert response.status_code == 200, response.text
    norms = {"residual_norm": 1.0, "attention_norm": 2.0, "mlp_norm": 3.0}
    layer: dict[str, Any] = {"lens": [A | {"logprob": -0.5}], **norms, "heads": [[[0, 0.75]]], "experts": None}
    layer["state"] = {"kept": 0.9, "written": 0.25}
    assert response.json() == {
        **{"id": None, "model": "tiny", "num_layers": 2, "num_heads": 1, "num_experts": 0},
        **{"num_prompt_tokens": 2, "num_tokens": 2, "start": 1, "end": 2},
        "tokens": [A, B],
        "positions": [{"position": 1, "layers": [layer, layer], "next": None, "recomputed": None, "is_equal": None}],
        "attention": {"layer": 1, "head": 0, "rows": [[0.75, 0.25]]},
        **{"sampling": None, "is_equal": None},
    }
    assert inspect(server, prompt=[97, 98]).json()["tokens"] == response.json()["tokens"]


def test_an_inspection_of_a_request(server: RunningServer, streams: ExitStack) -> None:
    start(server, streams, "mine", prompt="ab")
    body = inspect(server, id="mine").json()
    assert body["id"].startswith("cmpl-")
    (position,) = body["positions"]
    assert (position["next"], position["recomputed"], position["is_equal"], body["is_equal"]) == (B, B, True, True)
    assert body["attention"] is None
    a, noise = A | {"logprob": -0.5}, [B | {"logit": 1.5, "noise": 0.5}]
    logits = {"name": "logits", "num_tokens": 3, "num_removed": 0, "top": [a], "removed": []}
    top_k = {"name": "top_k", "num_tokens": 1, "num_removed": 2, "top": [B | {"logprob": 0.0}], "removed": [a]}
    assert body["sampling"] == {"position": 1, "stages": [logits, top_k], "noise": noise, "recomputed": B, "sent": B}


PROBLEMS = {
    InspectionProblem.BUSY: (429, "rate_limit_exceeded"),
    InspectionProblem.NO_BLOCKS: (503, "overloaded"),
    InspectionProblem.NO_ADAPTER: (404, "adapter_not_loaded"),
    InspectionProblem.NOT_FOUND: (404, "request_not_found"),
    InspectionProblem.NOT_KEPT: (404, "tokens_not_kept"),
    InspectionProblem.OUT_OF_RANGE: (400, "invalid_value"),
    InspectionProblem.TOO_LONG: (400, "invalid_value"),
    InspectionProblem.TOO_SLOW: (503, "overloaded"),
}


@pytest.mark.parametrize("problem", InspectionProblem)
def test_problems_of_inspections(server: RunningServer, problem: InspectionProblem) -> None:
    server.engine.config.inspection_problem = problem
    response, (status, code) = inspect(server, id="a", end=9), PROBLEMS[problem]
    error = check_error(response, status)
    assert (error["code"], "retry-after" in response.headers) == (code, status in (429, 503))
    if problem is InspectionProblem.OUT_OF_RANGE:
        assert "of 3 positions, expected 0 <= start < end <= 3" in error["message"]
        assert f"at most {MAX_POSITIONS} positions" in error["message"]


def test_inspections_need_the_key_of_the_request(keyed: RunningServer, streams: ExitStack) -> None:
    start(keyed, streams, "mine", "key-a")
    for key, status in (("", 401), ("key-b", 404), ("key-a", 200), ("root", 200)):
        assert inspect(keyed, key, id="mine").status_code == status


def test_positions_count_as_tokens(start_server: StartServer, streams: ExitStack, tmp_path: Path) -> None:
    server = start_server(api_keys_file=str(write_keys_file(tmp_path, tokens_per_day=8)))

    def usage(key: str) -> int:
        (own,) = httpx.get(server.url + "/v1/usage", headers=auth(key)).json()["data"]
        return int(own["prompt_tokens"])

    for fields, expected in (({"end": 2}, 2), ({}, 6)):
        assert inspect(server, "a", prompt="abcd", **fields).status_code == 200
        assert usage("a") == expected
    for problem in (InspectionProblem.BUSY, InspectionProblem.TOO_SLOW):
        server.engine.config.inspection_problem = problem
        inspect(server, "a", prompt="abcd")
    assert usage("a") == 10  # what is refused costs nothing
    assert check_error(inspect(server, "a", prompt="abcd"), 429)["code"] == "insufficient_quota"
    server.engine.config.inspection_problem = None
    start(server, streams, "mine", "b")
    before = usage("b")
    end = inspect(server, "b", id="mine").json()["end"]
    assert usage("b") - before == end > 0


def test_a_prompt_longer_than_the_context(server: RunningServer, fake_engine: FakeEngine) -> None:
    too_long = fake_engine.config.max_model_len + 1
    assert check_error(inspect(server, prompt=[97] * too_long), 400)["code"] == "context_length_exceeded"
    error = check_error(inspect(server, prompt="a" * 1_000_000), 400)
    assert " at least " in error["message"]  # it was not tokenized


# Who may read.

KEYS: dict[str, Any] = {"api_key": ("key-a", "key-b"), "admin_key": "root"}
BEYOND: dict[str, Any] = {"host": "0.0.0.0", "allow_unauthenticated": True}
ANYBODY: dict[str, Any] = {"allowed_origins": ("*",)}
PUBLIC: dict[str, Any] = {"inspect_public": True}
PAGE = "https://page.example"
PATHS = ("steps", "queue", "blocks", "trace", "requests", "requests/mine", "requests/mine/trace", "events")


def test_it_can_be_turned_off(start_server: StartServer) -> None:
    closed, public = start_server(inspect=False), start_server(inspect=False, **PUBLIC, **KEYS)
    for path in PATHS:
        assert check_error(get(closed, path), 404)["code"] == "not_enabled"
        assert check_error(get(public, path, "root"), 404)["code"] == "not_enabled"
        check_error(get(public, path), 401)
    check_error(httpx.post(f"{closed.url}/lightwell/v1/inspect", json={"prompt": "a"}), 404)


PROXIED = [{name: "for=10.0.0.1"} for name in ("forwarded", "X-Forwarded-For", "x_forwarded_proto", "via")]
PROXIED += [{"cf-connecting-ip": "10.0.0.1"}]
OTHERS = [{"host": "rebound.example"}, {"origin": PAGE}, {"origin": "null"}]
HOSTS = [{"host": "192.0.2.7:8000"}, {"host": "my-machine"}]
LOCAL = "http://127.0.0.1:3000"  # may read, and is another site than localhost
SITES = [{"sec_fetch_site": site} for site in ("none", "same-origin", "same-site")]
SITES += [{"origin": LOCAL, "sec_fetch_site": "cross-site"}]
NO_CORS = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}  # of an image or a link
AI = {"host": "ai.example"}  # a name of the server itself


@pytest.mark.parametrize(
    ("settings", "key", "allowed", "refused"),
    [
        ({}, "", [{}, {"origin": "http://localhost:3000"}, *SITES], [*PROXIED, *OTHERS, NO_CORS]),
        (ANYBODY, "", [], [{}]),
        (BEYOND, "", [], [{}]),
        ({"allowed_origins": (PAGE, "*")}, "", [], [{}]),
        (PUBLIC, "", [*PROXIED, *HOSTS], OTHERS),
        (PUBLIC | ANYBODY, "", [{}, *HOSTS], OTHERS),
        (PUBLIC | BEYOND, "", [{}, *HOSTS], OTHERS),
        (PUBLIC | {"allowed_origins": (PAGE, "*")}, "", [{}], []),
        (KEYS | BEYOND, "key-a", [{}, *PROXIED], []),
        (KEYS | ANYBODY, "key-a", [{}, AI | {"origin": "https://ai.example"}], [AI | {"origin": PAGE}]),
        ({"allowed_origins": (PAGE,)}, "", [{"origin": PAGE}, {"host": "page.example"}], [{"origin": "https://o.com"}]),
    ],
)
def test_hosts_and_origins(
    start_server: StartServer, settings: dict[str, Any], key: str, allowed: list[Fields], refused: list[Fields]
) -> None:
    server = start_server(**settings)
    for headers in allowed:
        assert get(server, "steps", key, **headers).status_code == 200, headers
    for headers in refused:
        message = check_error(get(server, "steps", key, **headers), 403)["message"]
        if headers in PROXIED or headers == {}:
            assert "".join(headers).lower().replace("_", "-") in message
            assert "--inspect-public" in message


@pytest.mark.parametrize("settings", [PUBLIC | ANYBODY, KEYS])
def test_a_file_may_not_read_without_a_host(start_server: StartServer, settings: dict[str, Any]) -> None:
    with start_server(**settings).connect() as connection:
        headers = "Origin: null\r\nAuthorization: Bearer key-a\r\n"
        connection.sendall(f"GET /lightwell/v1/steps HTTP/1.0\r\n{headers}\r\n".encode())
        with connection.makefile("rb") as answer:
            assert answer.readline().split()[1] == b"403"


# The stream of steps.

PATH = "/lightwell/v1/events"
Event = tuple[str, dict[str, Any]]
KEPT = 3  # steps of an engine with a small record


@contextmanager
def following(server: RunningServer, **headers: str) -> Iterator[Iterator[Event]]:
    """Yield the ids and the data of the events as they come."""
    with httpx.stream("GET", server.url + PATH, headers=fields_of(headers), timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        yield _parse(response.iter_lines())


def _parse(lines: Iterator[str]) -> Iterator[Event]:
    event_id = ""
    for name, _, value in (line.partition(": ") for line in lines):
        if name == "id":
            event_id = value.strip()
        elif name == "data":
            yield event_id, json.loads(value)


def run_step(server: RunningServer, engine: FakeEngine, step_id: int, tenants: tuple[str, ...] = ("",)) -> None:
    """Record a step, and let the engine report that it has run one."""
    engine.config.steps = [*engine.config.steps, example_step(step_id, tenants)]
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    assert httpx.post(server.url + COMPLETIONS, json=body, headers=auth("key-a")).status_code == 200


def ids(event: Event) -> list[int]:
    return [step["id"] for step in event[1]["data"]]


def num_readers(server: RunningServer) -> int:
    return server.context.part(StepReaders).total()


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
        num_before = len(fake_engine.received)
        for _ in range(num_steps):
            run_step(server, fake_engine, next(step_ids), tenants=("",) * 4000)
            fake_engine.config.steps = fake_engine.config.steps[-KEPT:]
            server.turn(2 * INTERVAL)
        return sum(isinstance(message, Ask) for message in fake_engine.received[num_before:])

    step_ids = count(1)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        wait_until(lambda: num_readers(server) == 1)
        while run_large_steps(10):
            assert fake_engine.config.steps[-1].id < 400
        assert run_large_steps(2 * KEPT) == 0
        connection.settimeout(60)
        with connection.makefile("rb") as stream:
            events, position, num_lost = _parse(line.decode() for line in stream), 0, 0
            while position < fake_engine.config.steps[-1].id:  # those before are there or counted as lost
                event = next(events)
                assert ids(event)[0] == position + event[1]["num_lost"] + 1
                num_lost += event[1]["num_lost"]
                position = ids(event)[-1]
                assert event[0].endswith(f"-{position}")
            assert num_lost >= KEPT


def test_an_idle_engine_is_not_asked(server: RunningServer, fake_engine: FakeEngine) -> None:
    with following(server) as events:
        run_step(server, fake_engine, 1)
        next(events)
        server.turn(INTERVAL)
        data(server, "steps")  # which the engine gets after all that it was asked before
        num_received = len(fake_engine.received)
        for _ in range(10):
            server.turn(INTERVAL)
        run_step(server, fake_engine, 2)  # of which the engine learns after what it has been asked
        new = fake_engine.received[num_received:]
        assert sum(isinstance(message, Ask) for message in new[: [*map(type, new)].index(Submit)]) == 0


def test_a_stream_follows_the_keys_file(start_server: StartServer, fake_engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    own, other = (hashlib.sha256(key.encode()).hexdigest() for key in ("key-b", "key-c"))

    def write(**fields: object) -> None:
        file.write_text(json.dumps({"team": {"keys": [other, own], **fields}}))

    write(admin=True)
    server = start_server(api_key=("key-a",), api_keys_file=str(file))
    with following(server, authorization="Bearer key-b") as events:
        run_step(server, fake_engine, 1, tenants=("key-1", "team"))
        assert shown(next(events)) == ["of-key-1", "of-team"]
        write()
        server.context.api_keys.reload()
        run_step(server, fake_engine, 2, tenants=("key-1", "team"))
        assert shown(next(events)) == [None, "of-team"]
        write(keys=other)
        server.context.api_keys.reload()
        assert [event[1]["error"]["code"] for event in events] == ["invalid_api_key"]
    wait_until(lambda: not server.context.part(StepReaders))


def shown(event: Event) -> list[str | None]:
    return [row["id"] for step in event[1]["data"] for row in step["rows"]]


def test_the_number_of_streams_is_limited(server: RunningServer) -> None:
    with ExitStack() as opened:
        for _ in range(MAX_READERS_EACH):
            opened.enter_context(following(server))
        assert num_readers(server) == MAX_READERS_EACH
        assert check_error(httpx.get(server.url + PATH), 429)["code"] == "rate_limit_exceeded"
    wait_until(lambda: not server.context.part(StepReaders))
    with following(server):
        assert num_readers(server) == 1


def test_it_ends_when_the_server_shuts_down(model_folder: Path) -> None:
    with fresh_server(model_folder) as server, following(server) as events:
        run_step(server, server.engine, 1)
        next(events)
        server.model.client.drain_requested.set()
        assert list(events) == []


# Traces made from records: sums of durations and places of slices, all computed another way.

OFFSET = 1.7e9  # Unix time of the engine's times
STAGES = ("tokenizing", "queue", "prefill", "decode", "preempted")


def built(trace: TraceBuilder) -> dict[str, Any]:
    """Return a trace as a client gets it."""
    whole = Trace(trace_events=trace.events, other_data=TraceInfo(engine="e", is_complete=True))
    answer: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(whole))
    check_trace(answer)
    return answer


@st.composite
def lives(draw: st.DrawFn) -> tuple[RequestRecord, float]:
    """A choice that is queued, scheduled, and then preempted and resumed in turn, and the time when it is read."""
    durations, num_pauses = draw(st.lists(st.floats(0, 100), min_size=1, max_size=12)), draw(st.integers(0, 5))
    arrival, queued, *later = accumulate(durations, initial=1.0)
    now = later[-1] if later else queued
    record = RequestRecord(submit=new_submit(), index=0, arrival=arrival, queued=queued, num_prompt_tokens=5)
    record.scheduled = later.pop(0) if later else None
    record.first_token = later.pop(2 * num_pauses) if 2 * num_pauses < len(later) else None
    record.preemptions, record.resumptions = later[::2], later[1::2]
    if draw(st.booleans()) and len(later) % 2 == 0:
        record.finished = now
    return record, now


@given(life=lives(), chunk_steps=st.lists(st.tuples(st.floats(0, 50), st.floats(0.001, 50)), max_size=5))
def test_the_slices_of_a_choice(life: tuple[RequestRecord, float], chunk_steps: list[tuple[float, float]]) -> None:
    """Whatever the steps of its chunks were, slices nest, and the stages fill the wall time to the microsecond."""
    record, now = life
    times = record.times()
    spans = stage_spans(times, now)
    assert (spans[0].start, spans[-1].end) == (times.arrival, now)
    assert all(before.end == after.start <= after.end for before, after in pairwise(spans))
    sums = {name: sum(span.end - span.start for span in spans if span.name == name) for name in STAGES}
    expected = stages(times, now)
    assert sums == pytest.approx({name: getattr(expected, name) for name in STAGES}, abs=1e-6)
    if len(record.preemptions) > len(record.resumptions):
        assert expected.preempted >= now - record.preemptions[-1] - 1e-9
    trace, begins = TraceBuilder(OFFSET), accumulate(pause for pause, _ in chunk_steps)
    for number, (at, (_, seconds)) in enumerate(zip(begins, chunk_steps, strict=True)):
        trace.add_steps([example_step(number, started=at, seconds={"forward": seconds})])
    chunks = [make(ChunkView, number, 4 * number, 4) for number in range(len(chunk_steps))]
    trace.add_choice("r 0.0", times, chunks, now, {"id": "r"})
    answer = built(trace)
    wall = round(1e6 * (now + OFFSET)) - round(1e6 * (times.arrival + OFFSET))
    if wall == 0:
        assert requests_in(answer) == []
        return
    ((whole, *parts),) = requests_in(answer)
    assert whole["dur"] == wall == sum(part["dur"] for part in parts if part["name"] in STAGES)
    computing = [part for part in parts if part["name"] in ("prefill", "decode")]
    for part in (part for part in parts if part["name"] == "chunk"):
        end = part["ts"] + part["dur"]
        assert any(stage["ts"] <= part["ts"] and end <= stage["ts"] + stage["dur"] for stage in computing)


def test_what_a_step_computed() -> None:
    trace = TraceBuilder(OFFSET)
    trace.add_steps([example_step(7, ("a", "b"), started=2.0, seconds={"schedule": 0.001, "forward": 0.5})])
    answer = built(trace)
    whole, first, second = tracks(answer)[1, 1]
    assert (whole["ts"], whole["dur"]) == (1_700_000_002_000_000, 501_000)
    assert (first["name"], first["ts"], first["dur"]) == ("schedule", whole["ts"], 1000)
    assert (second["name"], second["ts"], second["dur"]) == ("forward", whole["ts"] + 1000, 500_000)
    drafts = {"drafts": 4, "accepted_drafts": 2}
    assert whole["args"] == {"id": 7, "choices": 2, "prompt_tokens": 0, "generated_tokens": 4, **drafts}
    counters = [(event["name"], event["args"]) for event in answer["traceEvents"] if event["ph"] == "C"]
    assert counters == [("choices", {"running": 2, "waiting": 1}), ("KV blocks", {"used": 3})]


def test_steps_that_overlap_have_tracks_of_their_own() -> None:
    """The parts fill their step, though none of them takes whole microseconds."""
    trace = TraceBuilder(OFFSET)
    parts = {"schedule": 1.4e-6, "forward": 0.15, "wait": 1.4e-6, "update": 1.4e-6}
    trace.add_steps(example_step(number, started=0.1 * number, seconds=parts) for number in range(1, 6))
    found = {}
    for track, slices in tracks(built(trace)).items():
        wholes = [event for event in slices if event["name"] == "step"]
        assert 2 * sum(event["dur"] for event in wholes) == sum(event["dur"] for event in slices)
        found[track] = [event["args"]["id"] for event in wholes]
    assert found == {(1, 1): [1, 3, 5], (1, 2): [2, 4]}


CHUNKS = [(1, 0, 8), (2, 8, 1), (99, 9, 1)]


def test_a_prompt_in_two_chunks() -> None:
    trace = TraceBuilder(OFFSET)
    trace.add_steps(example_step(n, started=2.0 + n, seconds={"forward": 1.0, "update": n - 1.0}) for n in (1, 2))
    record = RequestRecord(
        submit=new_submit(), index=0, arrival=1.0, queued=2.0, num_prompt_tokens=9, scheduled=3.25, first_token=5.5
    )
    trace.add_choice("r 0.0", record.times(), [make(ChunkView, *each) for each in CHUNKS], 8.0, {})
    ((_, *parts),) = requests_in(built(trace))
    second = 1_000_000
    assert [(part["name"], part["ts"] - 1_700_000_000 * second, part["dur"]) for part in parts] == [
        ("tokenizing", second, second),
        ("queue", 2 * second, 1_250_000),
        ("prefill", 3_250_000, 2_250_000),
        ("decode", 5_500_000, 2_500_000),
        ("chunk", 3_250_000, 750_000),
        ("chunk", 4 * second, 1_500_000),
    ]
