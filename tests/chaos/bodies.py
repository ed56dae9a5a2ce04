"""What clients ask for: requests whose answers are known, random ones, and bad ones."""

import random
from typing import Any

from tests.support.server_process import CHAT, COMPLETIONS, MODEL

MESSAGES = [{"role": "user", "content": "Tell me a story"}]
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
TOOL = {"type": "function", "function": {"name": "get_age", "parameters": SCHEMA}}
DOCUMENTS = ["Paris is the capital of France.", "Bread is made of flour and water."]

# Requests that always have the same answer, by name.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "logprobs": 3}),
    "choices": (COMPLETIONS, {"prompt": "The capital of France is", "max_tokens": 12, "seed": 7, "n": 3}),
    "prompts": (COMPLETIONS, {"prompt": ["def add(a, b):", "import"], "max_tokens": 8, "seed": 9}),
    "stop": (COMPLETIONS, {"prompt": "1, 2, 3, 4,", "max_tokens": 40, "temperature": 0, "stop": [" 9"]}),
    "long": (COMPLETIONS, {"prompt": "The cat sat on the mat. " * 90, "max_tokens": 4, "temperature": 0}),
    "regex": (
        COMPLETIONS,
        {"prompt": "A:", "structured_outputs": {"regex": "[a-z]{3,9}"}, "max_tokens": 12, "seed": 3},
    ),
    "chat": (CHAT, {"messages": MESSAGES, "max_tokens": 16, "temperature": 0.8, "top_p": 0.9, "seed": 11}),
    "schema": (
        CHAT,
        {
            "messages": MESSAGES,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
            "max_tokens": 40,
            "seed": 12,
        },
    ),
    "tool": (CHAT, {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", "max_tokens": 60, "seed": 13}),
    "responses": ("/v1/responses", {"input": "Hi", "max_output_tokens": 16, "temperature": 0, "store": False}),
    "messages": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}),
    "embeddings": ("/v1/embeddings", {"input": ["A cat", "A dog"]}),
    "rerank": ("/v1/rerank", {"query": "Where is Paris?", "documents": DOCUMENTS}),
    "tokenize": ("/tokenize", {"messages": MESSAGES}),
}
STREAMED = ("greedy", "choices", "prompts", "stop", "long", "regex", "chat", "schema")

# What differs between answers to the same request.
VOLATILE = {"id", "call_id", "created", "created_at", "completed_at", "usage"}

LONG = "a " * 5000  # more than the context
JSON, TEXT = {"content-type": "application/json"}, {"content-type": "text/plain"}


def stable(answer: Any) -> Any:
    """Return what must be the same in all answers to a request."""
    if isinstance(answer, dict):
        return {name: stable(value) for name, value in answer.items() if name not in VOLATILE}
    return [stable(item) for item in answer] if isinstance(answer, list) else answer


def random_request(rng: random.Random) -> tuple[str, dict[str, Any], int]:
    """Return a path, a body and the number of choices of the answer."""
    n = rng.choice((1, 1, 1, 2, 4))
    body: dict[str, Any] = {"n": n, "max_tokens": rng.choice((1, 5, 20, 60)), "priority": rng.choice((0, 0, 0, 5, -3))}
    if rng.random() < 0.5:
        body["temperature"] = rng.choice((0, 0.7, 1.5))
    if rng.random() < 0.3:
        pattern = rng.choice(("[a-z]{3}", "(yes|no)", f"x{{{rng.randint(1, 50)}}}"))
        body["structured_outputs"] = {"regex": pattern}
    text = rng.choice(("cat ", "1 2 3 ", "Über ")) * rng.randint(1, 150)
    if rng.random() < 0.5:
        return CHAT, body | {"messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": 2}, n
    prompts = [text, "B"] if rng.random() < 0.3 else [text]
    return COMPLETIONS, body | {"prompt": prompts, "logprobs": rng.choice((None, 2))}, n * len(prompts)


def bad_requests() -> list[tuple[int, dict[str, Any]]]:
    """Return the status that each of some bad requests must get, and the arguments of httpx's `request`."""
    fields = {"model": MODEL, "prompt": "A", "max_tokens": 2}
    bodies = [
        (400, fields | {"temperature": "hot"}),
        (400, fields | {"n": 0}),
        (400, fields | {"prompt": LONG}),
        (400, fields | {"prompt": [[10**9]]}),
        (400, fields | {"structured_outputs": {"regex": "(a?){5000}a{5000}"}}),
        (400, fields | {"structured_outputs": {"regex": "("}}),
        (404, fields | {"model": "gpt-9"}),
    ]
    return [
        *((status, {"method": "POST", "url": COMPLETIONS, "json": body}) for status, body in bodies),
        (400, {"method": "POST", "url": COMPLETIONS, "content": b'{"model": ', "headers": JSON}),
        (400, {"method": "POST", "url": CHAT, "content": b"[" * 10_000, "headers": JSON}),
        (400, {"method": "POST", "url": CHAT, "json": {"model": MODEL, "messages": [{"role": "x"}]}}),
        (413, {"method": "POST", "url": COMPLETIONS, "content": b'"' + b"a" * (2 << 20), "headers": JSON}),
        (415, {"method": "POST", "url": COMPLETIONS, "content": b"prompt=A", "headers": TEXT}),
        (401, {"method": "GET", "url": "/v1/models", "headers": {"authorization": "Bearer wrong"}}),
        (404, {"method": "POST", "url": "/v1/nothing", "json": fields}),
        (405, {"method": "GET", "url": COMPLETIONS}),
        (404, {"method": "POST", "url": "/v1/requests/none/cancel"}),
    ]
