"""What a request may cost: the processor time of a real API process for the hardest bodies of each route.

The time of the event loop's thread, during which nobody else is served, has a bound, and no time grows faster than the
body. Meanwhile `/health` is answered, and another client gets its first token. A new route needs a hard body, and a new
field that can be large one of its own, in `tests/support/hard_bodies.py`.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from server.app import create_app
from tests.support.api_process import api_process
from tests.support.clients import CHAT, COMPLETIONS
from tests.support.fake_engine import FakeEngineConfig
from tests.support.hard_bodies import HARD_BODIES
from tests.support.serving import make_test_context, own_address
from tests.support.tool_model import write_tool_model

MAX_LOOP_SECONDS = 0.5  # for one request; most of the largest bodies take less than 0.1
FACTOR, MAX_GROWTH = 4, 8  # of a body, and of the time
FLOOR_SECONDS = 0.1  # less says nothing about growth: the clock ticks 100 times a second
LIMIT_SECONDS = 120.0  # bounds hangs only
IDS = {"response_id": "resp_1", "request_id": "req_1", "model_id": "tiny"}
KEYS = ("attacker", "bystander")
BODIES = [(route, name) for route, bodies in HARD_BODIES.items() for name in bodies]
FEW = [(CHAT, "options"), (COMPLETIONS, "a text"), ("/v1/responses", "metadata"), ("/tokenize", "a text")]


class Cost(NamedTuple):
    """Processor time in seconds."""

    loop: float  # of the event loop's thread
    others: float  # of the other threads and the child processes


class Api:
    """A running API process."""

    def __init__(self, pid: int, url: str, stack: ExitStack) -> None:
        self._process = psutil.Process(pid)
        clients = [httpx.Client(base_url=url, timeout=LIMIT_SECONDS, headers={"x-api-key": key}) for key in KEYS]
        self._attacker, self._bystander = map(stack.enter_context, clients)

    def send(self, method: str, path: str, body: bytes = b"") -> int:
        """Send a request and return the status of the response, which may be an endless stream."""
        headers = {"content-type": "application/json"} if body else {}
        with self._attacker.stream(method, path, content=body, headers=headers) as response:
            return response.status_code

    def cost_so_far(self) -> Cost:
        threads = {thread.id: thread.user_time + thread.system_time for thread in self._process.threads()}
        loop = threads.pop(self._process.pid)
        children = self._process.children(recursive=True)
        return Cost(loop, sum(threads.values()) + sum(sum(child.cpu_times()[:2]) for child in children))

    def cost(self, method: str, path: str, body: bytes = b"") -> Cost:
        """Send a request, which the server must not fail on, and return what it cost."""
        before = self.cost_so_far()
        assert self.send(method, path, body) < 500
        return Cost(*(now - then for now, then in zip(self.cost_so_far(), before, strict=True)))

    def ask_as_bystander(self) -> None:
        """Ask for the server's health and for a token, both of which must come."""
        assert self._bystander.get("/health").status_code == 200
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1, "stream": True}
        with self._bystander.stream("POST", COMPLETIONS, json=body) as response:
            assert next(response.iter_lines()).startswith('data: {"id":"cmpl-')


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("costs")
    model = write_tool_model(folder, special_tags=False)
    settings: dict[str, Any] = {"api_key": KEYS, "allow_runtime_lora_updating": True, "record_requests": 8}
    with own_address() as address, ExitStack() as stack:
        engine = FakeEngineConfig(address=address, max_model_len=1 << 17, num_blocks=1 << 16)
        started = stack.enter_context(api_process(engine, model, folder, dies=True, **settings))
        api = Api(started.process.pid, started.url, stack)
        started.wait_until_ready()
        api.ask_as_bystander()
        yield api


@pytest.fixture(scope="module")
def document(model_folder: Path) -> dict[str, Any]:
    """The OpenAPI document of the server."""
    context = make_test_context("ipc:///tmp/nowhere", model_folder, allow_runtime_lora_updating=True)
    described: dict[str, Any] = create_app(context).openapi()
    return described


def check_costs(api: Api, path: str, make: Callable[[int], bytes], size: int) -> None:
    """Assert that a request whose body grows up to a size costs little enough, and holds up nobody else."""
    api.cost("POST", path, make(1))  # what is done once
    costs = [api.cost("POST", path, make(max(1, part))) for part in (size // FACTOR, 2 * size // FACTOR, size)]
    small, _, large = costs
    assert large.loop < MAX_LOOP_SECONDS, costs
    for before, after in zip(small, large, strict=True):
        assert after < MAX_GROWTH * max(before, FLOOR_SECONDS), costs
    attack = threading.Thread(target=api.send, args=("POST", path, make(size)))
    attack.start()
    api.ask_as_bystander()
    while attack.is_alive():
        api.ask_as_bystander()


def test_each_route_has_hard_bodies(document: dict[str, Any]) -> None:
    assert {path for path, methods in document["paths"].items() if "post" in methods} == set(HARD_BODIES)


@pytest.mark.checklist("A07")
@pytest.mark.parametrize(
    ("route", "name"), [each if each in FEW else pytest.param(*each, marks=pytest.mark.long) for each in BODIES]
)
def test_hard_bodies(api: Api, route: str, name: str) -> None:
    make, size = HARD_BODIES[route][name]

    def body(size: int) -> bytes:
        made = make(size)
        return made if isinstance(made, bytes) else json.dumps(made).encode()

    check_costs(api, route.format(**IDS), body, size)


@pytest.mark.long
def test_long_texts_in_urls(api: Api, document: dict[str, Any]) -> None:
    """As large as the head of a request may be."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for name in [each["name"] for each in operation.get("parameters", ()) if each["in"] != "header"]:
                for text in ("a" * 8000, "1" * 8000, "a%2F" * 2000, "%C3" * 2000):
                    query = "" if f"{{{name}}}" in path else f"?{name}={text}"
                    url = path.format(**IDS | {name: text}) + query
                    assert api.cost(method.upper(), url).loop < MAX_LOOP_SECONDS
