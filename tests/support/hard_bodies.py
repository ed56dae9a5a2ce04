"""The requests that cost the server most, by route: each grows in one dimension, up to the limits of the server."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.clients import CHAT, COMPLETIONS, MESSAGES

Fields = dict[str, Any]

MAX_KEYS = 49_000  # each with an array as its value, so that a body has at most 100,000 of both
MAX_ITEMS = 1_000_000  # of arrays
MAX_CHARS = 9_000_000


@dataclass(frozen=True)
class HardBody:
    """A body that grows with a number.

    Attributes:
        make: returns the fields, or the bytes, for a number.
        size: the largest number that the limits of the server allow, about.
    """

    make: Callable[[int], Fields | bytes]
    size: int

    def body(self, size: int) -> bytes:
        body = self.make(size)
        return body if isinstance(body, bytes) else json.dumps(body).encode()


def chat(**fields: Any) -> Fields:
    return {"model": "tiny", "messages": MESSAGES, "max_tokens": 1, **fields}


def completion(**fields: Any) -> Fields:
    return {"model": "tiny", "prompt": "a", "max_tokens": 1, **fields}


def response(**fields: Any) -> Fields:
    return {"model": "tiny", "input": "a", "max_output_tokens": 1, **fields}


def message(**fields: Any) -> Fields:
    return {"model": "tiny", "messages": MESSAGES, "max_tokens": 1, **fields}


def ollama(**fields: Any) -> Fields:
    return {"model": "tiny", "messages": MESSAGES, "stream": False, "options": {"num_predict": 1}, **fields}


def keys(n: int, value: Any = 1) -> Fields:
    return {f"key{number}": value for number in range(n)}


def turns(n: int, **fields: Any) -> list[Fields]:
    return [{"role": "user", "content": "a", **fields}] * n


def call(n: int, arguments: str = "{}") -> Fields:
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


def tool(parameters: Any) -> Fields:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def function(number: int) -> Fields:
    return {"type": "function", "function": {"name": f"f{number}"}}


def as_format(schema: Any) -> Fields:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def result(n: int) -> list[Fields]:
    """Return Ollama's results of calls that nobody made, after many calls."""
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 1000}
    return [calls] * (n // 1000) + [{"role": "tool", "tool_name": "g", "content": "a"}] * n


_CHAT: Mapping[str, HardBody] = {
    "options": HardBody(lambda n: chat(chat_template_kwargs=keys(n, [])), MAX_KEYS),
    "calls with JSON": HardBody(lambda n: chat(messages=[call(1, json.dumps({"a": [[]] * n}))]), 3_000_000),
    "unknown fields": HardBody(lambda n: chat(**keys(n)), 2 * MAX_KEYS),
    "messages": HardBody(lambda n: chat(messages=turns(n)), 10_000),
    "numbers for messages": HardBody(lambda n: chat(messages=[1] * n), MAX_ITEMS),
    "tools": HardBody(lambda n: chat(tools=[function(i) for i in range(n)]), 128),
    "forced tools": HardBody(lambda n: chat(tool_choice="required", tools=[function(i) for i in range(n)]), 128),
    "properties of a tool": HardBody(lambda n: chat(tools=[tool(schema(n))]), 30_000),
    "references in a tool": HardBody(lambda n: chat(tools=[tool(references(n))]), 200),
    "references in a forced tool": HardBody(lambda n: chat(tools=[tool(references(n))], tool_choice="required"), 200),
    "a schema": HardBody(lambda n: chat(response_format=as_format(schema(n))), 30_000),
    "alternatives": HardBody(lambda n: chat(response_format=as_format({"oneOf": [schema(40)] * n})), 1000),
    "stop strings": HardBody(lambda n: chat(stop=[f"{i:03}" + "a" * 124 for i in range(n)]), 64),
    "bad words": HardBody(lambda n: chat(bad_words=["ab " * 341] * n), 64),
    "sequence breakers": HardBody(
        lambda n: chat(dry_multiplier=1, dry_sequence_breakers=[f"{i:040}" for i in range(n)]), 32
    ),
    "logit bias": HardBody(lambda n: chat(logit_bias={str(i): 1 for i in range(n)}), 2 * MAX_KEYS),
    "allowed tokens": HardBody(lambda n: chat(allowed_token_ids=[i % 250 for i in range(n)]), 260_000),
    "choices": HardBody(lambda n: chat(n=n), 8),
    "a pattern": HardBody(lambda n: chat(guided_regex="(a|b)" * n), 1600),
    "a grammar": HardBody(lambda n: chat(guided_grammar="start: " + '"a" ' * n), 4000),
    "rules": HardBody(
        lambda n: chat(grammar="root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(n)) + f'a{n} ::= "b"'),
        800,
    ),
    "texts to choose from": HardBody(lambda n: chat(guided_choice=[f"{i}" * 100 for i in range(n)]), 1000),
    "a schema as text": HardBody(lambda n: chat(guided_json='{"a":[' + "[]," * n + "1]}", json_schema="{}"), 3_000_000),
    "open brackets": HardBody(raw('{"a":', "[", ""), MAX_CHARS),
    "escaped quotes": HardBody(raw('{"a":"', '\\"', '"}' + "," * 2_000_000), 4_000_000),
    "digits": HardBody(raw('{"seed":', "1", "}"), MAX_CHARS),
    "lone surrogates": HardBody(raw('{"a":"', "\\ud800", '"}'), 1_500_000),
    "lines": HardBody(raw("", "\n", "x"), MAX_CHARS),
}
_COMPLETION: Mapping[str, HardBody] = {
    "a text": HardBody(lambda n: completion(prompt="a" * n), 1 << 17),
    "a text beyond the context": HardBody(lambda n: completion(prompt="a " * n), MAX_CHARS // 2),
    "token ids": HardBody(lambda n: completion(prompt=[97] * n), MAX_ITEMS),
    "prompts": HardBody(lambda n: completion(prompt=[[97] * 10] * n), 2 * MAX_KEYS),
    "log probabilities": HardBody(lambda n: completion(prompt="a" * n, prompt_logprobs=20), 16_000),
}
_RESPONSE: Mapping[str, HardBody] = {
    "metadata": HardBody(lambda n: response(metadata=keys(n, [])), MAX_KEYS),
    "items": HardBody(lambda n: response(input=turns(n)), 10_000),
    "items to cut": HardBody(lambda n: response(input=turns(n, content="a" * 60), truncation="auto"), 8_000),
    "calls": HardBody(
        lambda n: response(
            input=[{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}] * n + turns(1)
        ),
        9_999,
    ),
    "unknown tools": HardBody(lambda n: response(tools=[{"type": "a" * n}] * 64), MAX_CHARS // 64),
}
DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}}
_MESSAGE: Mapping[str, HardBody] = {
    "messages": HardBody(lambda n: message(messages=turns(n)), 10_000),
    "documents": HardBody(lambda n: message(messages=[{"role": "user", "content": [DOCUMENT] * n}]), 10_000),
    "system": HardBody(lambda n: message(system=[{"type": "text", "text": "a"}] * n), 30_000),
    "tools": HardBody(lambda n: message(tools=[{"name": f"f{i}", "input_schema": schema(9)} for i in range(n)]), 128),
}
_OLLAMA: Mapping[str, HardBody] = {
    "messages": HardBody(lambda n: ollama(messages=turns(n)), 10_000),
    "calls": HardBody(
        lambda n: ollama(
            messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}] * 8}] * n
        ),
        1000,
    ),
    "results": HardBody(lambda n: ollama(messages=result(n)), 8000),
}
_GENERATE: Mapping[str, HardBody] = {
    "time to stay": HardBody(lambda n: ollama(prompt="a", keep_alive="1" * n + "x"), 1000),
    "context": HardBody(lambda n: ollama(prompt="a", context=[97] * n), MAX_ITEMS),
    "stop strings": HardBody(lambda n: ollama(prompt="a", options={"stop": ["a"] * n}), MAX_ITEMS),
}
_TOKENIZE: Mapping[str, HardBody] = {
    "a text": HardBody(lambda n: {"prompt": "a" * n, "return_token_strs": True}, 1 << 20),
    "messages": HardBody(lambda n: {"messages": turns(n)}, 10_000),
}


def _text(name: str) -> Mapping[str, HardBody]:
    """Return a long text in one field of a route that reads little else."""
    return {name: HardBody(lambda n: {"model": "tiny", name: "a" * n}, MAX_CHARS)}


_NOTHING: Mapping[str, HardBody] = {"any body": HardBody(lambda n: keys(n, []), MAX_KEYS)}

HARD_BODIES: Mapping[str, Mapping[str, HardBody]] = {
    CHAT: _CHAT,
    f"{CHAT}/render": {"messages": _CHAT["messages"]},
    COMPLETIONS: _COMPLETION,
    f"{COMPLETIONS}/render": {"a text": _COMPLETION["a text"]},
    "/v1/responses": _RESPONSE,
    "/v1/responses/input_tokens": {"items": HardBody(lambda n: {"model": "tiny", "input": turns(n)}, 10_000)},
    "/v1/responses/{response_id}/cancel": _NOTHING,
    "/v1/messages": _MESSAGE,
    "/v1/messages/count_tokens": {"messages": HardBody(lambda n: {"model": "tiny", "messages": turns(n)}, 10_000)},
    "/api/chat": _OLLAMA,
    "/api/generate": _GENERATE,
    "/api/embed": {"inputs": HardBody(lambda n: {"model": "tiny", "input": ["a"] * n}, 2048), **_text("input")},
    "/api/embeddings": _text("prompt"),
    "/api/show": _text("model"),
    "/v1/embeddings": {
        "inputs": HardBody(lambda n: {"model": "tiny", "input": ["a"] * n}, 2048),
        **_text("input"),
    },
    "/v1/rerank": {
        "documents": HardBody(lambda n: {"model": "tiny", "query": "a", "documents": ["b"] * n}, 1000),
        "a query": HardBody(lambda n: {"model": "tiny", "query": "a" * n, "documents": ["b"] * 1000}, 1000),
    },
    "/v1/score": {"texts": HardBody(lambda n: {"model": "tiny", "text_1": ["a"] * n, "text_2": ["b"] * n}, 1000)},
    "/tokenize": _TOKENIZE,
    "/detokenize": {
        "token ids": HardBody(lambda n: {"tokens": [97] * n}, MAX_ITEMS),
    },
    "/lightwell/v1/inspect": {
        "wrong token ids": HardBody(lambda n: {"prompt": [""] * n}, MAX_ITEMS),
        **_text("prompt"),
    },
    "/v1/load_lora_adapter": {"a path": HardBody(lambda n: {"lora_name": "a", "lora_path": "a/" * n}, MAX_CHARS // 2)},
    "/v1/unload_lora_adapter": _text("lora_name"),
    "/v1/requests/{request_id}/cancel": _NOTHING,
    "/v1/requests/{request_id}/replay": _NOTHING,
}
