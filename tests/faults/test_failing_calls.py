"""Any single call of the system may fail: no request hangs, each ends once, and nothing is left behind.

As SQLite tests it: the same scenario is run again and again, and another call fails each time.
"""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import httpx
import pytest

from tests.faults.conftest import FaultyApi, StartApi
from tests.faults.failing_calls import ERRORS, Call, FailingCalls
from tests.support.api_process import SECONDS
from tests.support.serving import check_envelope, wait_until

pytestmark = pytest.mark.long

MESSAGES = [{"role": "user", "content": "Hi"}]
NUM_PARTS = 4  # so that a quarter of the long tests has some of each kind
_numbers = count()


@pytest.fixture(scope="module")
def api(start_api: StartApi, failing: FailingCalls) -> FaultyApi:
    api = start_api(environment=failing.environment)
    run_scenario(api)
    return api


def run_scenario(api: FaultyApi) -> None:
    """Send requests of each kind. Each must be answered, or break visibly."""
    constraint = {"regex": f"[a-z]+{next(_numbers)}"}  # not one whose check is known
    send(api, "/v1/completions", prompt="x")
    send(api, "/v1/completions", prompt="x", structured_outputs=constraint)
    assert send(api, "/v1/completions", prompt="x", n=0) in (None, 400)
    read_stream(api)
    abandon_stream(api)
    for path in ("/", "/metrics", "/health", "/v1/models"):
        with may_break():
            assert api.get(path).status_code in (200, 500, 503), path


@contextmanager
def may_break() -> Iterator[None]:
    """Ignore that the connection breaks, but not that an answer does not come."""
    try:
        yield
    except httpx.TimeoutException:
        raise
    except httpx.TransportError:
        pass


def send(api: FaultyApi, path: str, **body: object) -> int | None:
    """Send a request and return the status, or None if the connection broke."""
    with may_break():
        answer = api.post(path, **body)
        if answer.status_code != 200:
            check_envelope(answer.content)
        return answer.status_code
    return None


def read_stream(api: FaultyApi) -> None:
    """Read a stream, which must not end as if it were complete if it is not."""
    with may_break():
        answer = api.post("/v1/chat/completions", messages=MESSAGES, stream=True, n=2)
        if answer.status_code != 200:
            check_envelope(answer.content)
        else:
            assert answer.text.endswith("data: [DONE]\n\n")
            assert answer.text.count('"finish_reason":"stop"') == 2 or '"error"' in answer.text


def abandon_stream(api: FaultyApi) -> None:
    body = {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 2000}
    with may_break(), httpx.stream("POST", f"{api.url}/v1/completions", json=body, timeout=SECONDS) as answer:
        next(answer.iter_lines(), None)


@pytest.mark.drawn
@pytest.mark.checklist("E09", "F01", "G07")
@pytest.mark.parametrize("part", range(NUM_PARTS))
@pytest.mark.parametrize("kind", Call, ids=lambda kind: kind.name.lower())
def test_a_call_fails(api: FaultyApi, failing: FailingCalls, kind: Call, part: int) -> None:
    rng = random.Random(f"{kind} {part}")
    num_files, num_threads = api.process.num_fds() + 2, api.process.num_threads() + 2
    num_calls = count_calls(api, failing, kind)
    for _ in range(60):
        end_children(api, kind)
        failing.arm(kind, rng.randint(1, num_calls), rng.choice(ERRORS[kind]))
        run_scenario(api)
        failing.disarm()
        api.check_well(num_files, num_threads)


def count_calls(api: FaultyApi, failing: FailingCalls, kind: Call) -> int:
    end_children(api, kind)
    failing.arm()
    run_scenario(api)
    num_calls = failing.disarm()[kind]
    assert num_calls > 0
    return num_calls


def end_children(api: FaultyApi, kind: Call) -> None:
    """Kill the grammar process if it is to be started again."""
    for child in api.process.children() if kind is Call.FORK else ():
        child.kill()


@pytest.mark.checklist("G07")
def test_the_clock_jumps(api: FaultyApi, failing: FailingCalls) -> None:
    num_files, num_threads = api.process.num_fds() + 2, api.process.num_threads() + 2
    api.engine.config.step_seconds = 0.05
    for seconds in (86_400, -86_400, 30 * 86_400, 0):
        with ThreadPoolExecutor() as threads:
            stream = threads.submit(read_stream, api)
            whole = threads.submit(send, api, "/v1/completions", prompt="x")
            wait_until(lambda: api.engine.num_choices == 3, SECONDS)
            failing.move_clock(seconds)
            assert whole.result() == 200
            stream.result()
        assert api.get("/readyz").status_code == 200
        assert abs(api.post("/v1/completions", prompt="x").json()["created"] - time.time() - seconds) < 100
    api.engine.config.step_seconds = 0.0
    api.check_well(num_files, num_threads)
