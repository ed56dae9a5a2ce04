"""What a request may cost: the processor time of a real API process for the hardest bodies of each route.

The time of the event loop's thread, during which nobody else is served, has a bound, and no time grows faster than the
body. Meanwhile `/health` is answered, and another client gets its first token. A new route needs a hard body, and a new
field that can be large one of its own, in `HARD_BODIES`.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from server.app import create_app
from server.parts.page.part import make_document
from tests.support.api_process import api_process
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES
from tests.support.fake_engine import FakeEngineConfig
from tests.support.serving import make_test_context, own_address
from tests.support.tool_model import write_tool_model

# The requests that cost the server most, by route: each grows in one dimension, up to the limits of the server.

Fields = dict[str, Any]

MAX_KEYS = 49_000  # each with an array as its value, so that a body has at most 100,000 of both
MAX_ITEMS = 1_000_000  # of arrays
MAX_CHARS = 9_000_000


# How a body grows with a number, and the largest number that the limits of the server allow, about.
HardBody = tuple[Callable[[int], Fields | bytes], int]

chat: Callable[..., Fields] = partial(dict, model="tiny", messages=MESSAGES, max_tokens=1)
forced: Callable[..., Fields] = partial(chat, tool_choice="required")
completion: Callable[..., Fields] = partial(dict, model="tiny", prompt="a", max_tokens=1)
response: Callable[..., Fields] = partial(dict, model="tiny", input="a", max_output_tokens=1)
ollama: Callable[..., Fields] = partial(dict, model="tiny", messages=MESSAGES, stream=False, options={"num_predict": 1})


def keys(n: int, value: Any = 1) -> Fields:
    return {f"key{number}": value for number in range(n)}


def turns(n: int, **fields: Any) -> list[Fields]:
    return [{"role": "user", "content": "a", **fields}] * n


def call(n: int, arguments: Any = "{}") -> Fields:
    """Return a message with earlier calls."""
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}] * n}


def raw(before: str, piece: str, after: str) -> Callable[[int], bytes]:
    """Return a maker of bodies, valid or not, in which a piece is repeated."""
    return lambda n: (before + piece * n + after).encode()


def schema(n: int) -> Fields:
    return {"type": "object", "properties": keys(n, {"type": "string"})}


def references(n: int) -> Fields:
    """Return a schema whose definitions refer to several others, and these to them."""
    parts = [[{"$ref": f"#/$defs/{(number + step) % n}"} for step in range(9)] for number in range(n)]
    definitions = {str(number): {"anyOf": part, "properties": {"a": part[0]}} for number, part in enumerate(parts)}
    return {"type": "object", "properties": {"a": {"$ref": "#/$defs/0"}}, "$defs": definitions}


def tool(name: str, **fields: Any) -> Fields:
    return {"type": "function", "function": {"name": name, **fields}}


def as_format(schema: Any) -> Fields:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


_CHAT: Mapping[str, HardBody] = {
    "options": (lambda n: chat(chat_template_kwargs=keys(n, [])), MAX_KEYS),
    "calls with JSON": (lambda n: chat(messages=[call(1, json.dumps({"a": [[]] * n}))]), 3_000_000),
    "unknown fields": (lambda n: chat(**keys(n)), 2 * MAX_KEYS),
    "messages": (lambda n: chat(messages=turns(n)), 10_000),
    "numbers for messages": (lambda n: chat(messages=[1] * n), MAX_ITEMS),
    "tools": (lambda n: chat(tools=[tool(f"f{i}") for i in range(n)]), 128),
    "forced tools": (lambda n: forced(tools=[tool(f"f{i}") for i in range(n)]), 128),
    "properties of a tool": (lambda n: chat(tools=[tool("f", parameters=schema(n))]), 30_000),
    "references in a tool": (lambda n: chat(tools=[tool("f", parameters=references(n))]), 200),
    "forced references": (lambda n: forced(tools=[tool("f", parameters=references(n))]), 200),
    "a schema": (lambda n: chat(response_format=as_format(schema(n))), 30_000),
    "alternatives": (lambda n: chat(response_format=as_format({"oneOf": [schema(40)] * n})), 1000),
    "stop strings": (lambda n: chat(stop=[f"{i:03}" + "a" * 124 for i in range(n)]), 64),
    "bad words": (lambda n: chat(bad_words=["ab " * 341] * n), 64),
    "sequence breakers": (lambda n: chat(dry_multiplier=1, dry_sequence_breakers=[f"{i:040}" for i in range(n)]), 32),
    "logit bias": (lambda n: chat(logit_bias={str(i): 1 for i in range(n)}), 2 * MAX_KEYS),
    "allowed tokens": (lambda n: chat(allowed_token_ids=[i % 250 for i in range(n)]), 260_000),
    "choices": (lambda n: chat(n=n), 8),
    "a pattern": (lambda n: chat(regex="(a|b)" * n), 1600),
    "a grammar": (lambda n: chat(ebnf="start: " + '"a" ' * n), 4000),
    "rules": (
        lambda n: chat(grammar="root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(n)) + f'a{n} ::= "b"'),
        800,
    ),
    "texts to choose from": (lambda n: chat(structured_outputs={"choice": [f"{i}" * 100 for i in range(n)]}), 1000),
    "a schema as text": (lambda n: chat(json_schema='{"a":[' + "[]," * n + "1]}", regex="a"), 3_000_000),
    "open brackets": (raw('{"a":', "[", ""), MAX_CHARS),
    "escaped quotes": (raw('{"a":"', '\\"', '"}' + "," * 2_000_000), 4_000_000),
    "digits": (raw('{"seed":', "1", "}"), MAX_CHARS),
    "lone surrogates": (raw('{"a":"', "\\ud800", '"}'), 1_500_000),
    "lines": (raw("", "\n", "x"), MAX_CHARS),
}
_COMPLETION: Mapping[str, HardBody] = {
    "a text": (lambda n: completion(prompt="a" * n), 1 << 17),
    "a text beyond the context": (lambda n: completion(prompt="a " * n), MAX_CHARS // 2),
    "token ids": (lambda n: completion(prompt=[97] * n), MAX_ITEMS),
    "prompts": (lambda n: completion(prompt=[[97] * 10] * n), 2 * MAX_KEYS),
    "log probabilities": (lambda n: completion(prompt="a" * n, prompt_logprobs=20), 16_000),
}
FUNCTION_CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
_RESPONSE: Mapping[str, HardBody] = {
    "metadata": (lambda n: response(metadata=keys(n, [])), MAX_KEYS),
    "items": (lambda n: response(input=turns(n)), 10_000),
    "items to cut": (lambda n: response(input=turns(n, content="a" * 60), truncation="auto"), 8_000),
    "calls": (lambda n: response(input=[FUNCTION_CALL] * n + turns(1)), 9_999),
    "unknown tools": (lambda n: response(tools=[{"type": "a" * n}] * 64), MAX_CHARS // 64),
}
DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}}
_MESSAGE: Mapping[str, HardBody] = {
    "messages": (lambda n: chat(messages=turns(n)), 10_000),
    "documents": (lambda n: chat(messages=[{"role": "user", "content": [DOCUMENT] * n}]), 10_000),
    "system": (lambda n: chat(system=[{"type": "text", "text": "a"}] * n), 30_000),
    "tools": (lambda n: chat(tools=[{"name": f"f{i}", "input_schema": schema(9)} for i in range(n)]), 128),
}
RESULT = {"role": "tool", "tool_name": "g", "content": "a"}
_OLLAMA: Mapping[str, HardBody] = {
    "messages": (lambda n: ollama(messages=turns(n)), 10_000),
    "calls": (lambda n: ollama(messages=[call(8, {"a": 1})] * n), 1000),
    # Of calls that nobody made, after many calls.
    "results": (lambda n: ollama(messages=[call(1000, {})] * (n // 1000) + [RESULT] * n), 8000),
}


def _text(name: str) -> Mapping[str, HardBody]:
    """Return a long text in one field of a route that reads little else."""
    return {name: (lambda n: {"model": "tiny", name: "a" * n}, MAX_CHARS)}


_NOTHING: Mapping[str, HardBody] = {"any body": (lambda n: keys(n, []), MAX_KEYS)}

HARD_BODIES: Mapping[str, Mapping[str, HardBody]] = {
    CHAT: _CHAT,
    f"{CHAT}/render": {"messages": _CHAT["messages"]},
    COMPLETIONS: _COMPLETION,
    f"{COMPLETIONS}/render": {"a text": _COMPLETION["a text"]},
    "/v1/responses": _RESPONSE,
    "/v1/responses/input_tokens": {"items": (lambda n: {"model": "tiny", "input": turns(n)}, 10_000)},
    "/v1/responses/{response_id}/cancel": _NOTHING,
    "/v1/messages": _MESSAGE,
    "/v1/messages/count_tokens": {"messages": (lambda n: {"model": "tiny", "messages": turns(n)}, 10_000)},
    "/api/chat": _OLLAMA,
    "/api/generate": {
        "time to stay": (lambda n: ollama(prompt="a", keep_alive="1" * n + "x"), 1000),
        "context": (lambda n: ollama(prompt="a", context=[97] * n), MAX_ITEMS),
        "stop strings": (lambda n: ollama(prompt="a", options={"stop": ["a"] * n}), MAX_ITEMS),
    },
    "/api/embed": {"inputs": (lambda n: {"model": "tiny", "input": ["a"] * n}, 2048), **_text("input")},
    "/api/embeddings": _text("prompt"),
    "/api/show": _text("model"),
    "/v1/embeddings": {"inputs": (lambda n: {"model": "tiny", "input": ["a"] * n}, 2048), **_text("input")},
    "/v1/rerank": {
        "documents": (lambda n: {"model": "tiny", "query": "a", "documents": ["b"] * n}, 1000),
        "a query": (lambda n: {"model": "tiny", "query": "a" * n, "documents": ["b"] * 1000}, 1000),
    },
    "/v1/score": {"texts": (lambda n: {"model": "tiny", "text_1": ["a"] * n, "text_2": ["b"] * n}, 1000)},
    "/tokenize": {
        "a text": (lambda n: {"prompt": "a" * n, "return_token_strs": True}, 1 << 20),
        "messages": (lambda n: {"messages": turns(n)}, 10_000),
    },
    "/detokenize": {"token ids": (lambda n: {"tokens": [97] * n}, MAX_ITEMS)},
    "/lightwell/v1/inspect": {"wrong token ids": (lambda n: {"prompt": [""] * n}, MAX_ITEMS), **_text("prompt")},
    "/v1/load_lora_adapter": {"a path": (lambda n: {"lora_name": "a", "lora_path": "a/" * n}, MAX_CHARS // 2)},
    "/v1/unload_lora_adapter": _text("lora_name"),
    "/v1/requests/{request_id}/cancel": _NOTHING,
    "/v1/requests/{request_id}/replay": _NOTHING,
}


# What they cost.

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
    return make_document(create_app(context), context)


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
