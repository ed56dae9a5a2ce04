"""Measure the cost of a JSON schema on all streams: `python -m tests.bench.structured [MODEL] [--streams 32]`.

All clients request a chat answer of 64 tokens at once, as free text or as JSON of a schema that always needs more than
64 tokens. Rounds of the cases alternate on the same server; the median of the rounds counts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import httpx

from tests.bench.serve import MODEL_NAME, parse, run, running_server
from tests.bench.streams import Body, compare, tokens_per_second

NUM_TOKENS = 64


def people(name: dict[str, Any]) -> dict[str, Any]:
    """Return the request fields for an array of people whose names match a schema."""
    person = {
        "type": "object",
        "properties": {"name": name, "age": {"type": "integer"}, "city": name},
        "required": ["name", "age", "city"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": person, "minItems": 20}
    json_schema = {"name": "people", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


FORMS: dict[str, dict[str, Any]] = {
    "free text": {"ignore_eos": True},
    "JSON schema": people({"type": "string"}),
    "JSON schema, strings of 2 to 40 characters": people({"type": "string", "minLength": 2, "maxLength": 40}),
}


def bodies_of(form: str, num_streams: int, seed: int) -> list[Body]:
    return [
        {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": f"Invent {20 + number} people who live in a small town."}],
            "max_completion_tokens": NUM_TOKENS,
            "temperature": 1.0,
            "seed": 1000 * seed + number,
            **FORMS[form],
        }
        for number in range(num_streams)
    ]


def main() -> int:
    arguments = parse("structured", __doc__, streams=(32, "concurrent requests"), rounds=(7, "of each case"))
    limits = httpx.Limits(max_connections=arguments.streams)
    with (
        running_server(arguments.model) as (url, _),
        httpx.Client(timeout=300, trust_env=False, limits=limits) as client,
    ):

        def rate_of(form: str, number: int) -> float:
            bodies = bodies_of(form, arguments.streams, number)
            return tokens_per_second(client, f"{url}/v1/chat/completions", bodies)

        compare({form: partial(rate_of, form) for form in FORMS}, arguments.rounds)
    return 0


if __name__ == "__main__":
    run(main)
