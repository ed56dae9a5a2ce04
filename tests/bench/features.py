"""Measure what a feature costs or gains: `python -m tests.bench.features FEATURE [MODEL]`.

    structured     a JSON schema that always needs more tokens than an answer has, on all streams
    lora           random adapters of all matrices: none in use, one, or eight in turn
    speculation    n-gram drafts for one stream, whose prompt contains a passage twice or once

All clients send a request at once. Rounds of the cases alternate, on servers that run at the same time; the median of
the rounds counts, of which the first only warms up.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import httpx

from engine.config import load_model_config
from server.model_paths import resolve_model
from tests.bench.quality import TEXT
from tests.bench.serve import MODEL_NAME, parse, print_rows, run, running_server
from tests.support.lora_adapters import save_random_adapter

NUM_TOKENS = 64
NUM_ADAPTERS, RANK = 8, 16

Bodies: TypeAlias = Callable[[int], Sequence[Mapping[str, Any]]]  # of the requests of a round
Cases: TypeAlias = dict[str, tuple[str, Bodies]]  # URL and bodies by the name of the case
Start: TypeAlias = Callable[..., str]  # starts a server with flags, and returns its address


def people(name: dict[str, Any]) -> dict[str, Any]:
    """Return the request fields for an array of people whose names match a schema."""
    properties = {"name": name, "age": {"type": "integer"}, "city": name}
    person = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    schema = {"type": "array", "items": person, "minItems": 20}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "people", "schema": schema}}}


FORMS: dict[str, dict[str, Any]] = {
    "free text": {"ignore_eos": True},
    "JSON schema": people({"type": "string"}),
    "JSON schema, strings of 2 to 40 characters": people({"type": "string", "minLength": 2, "maxLength": 40}),
}


def structured(start: Start, model: str, num_streams: int) -> Iterator[tuple[str, Cases]]:
    def bodies(form: dict[str, Any], seed: int) -> list[dict[str, Any]]:
        fixed = {"model": MODEL_NAME, "max_completion_tokens": NUM_TOKENS, "temperature": 1.0} | form
        texts = [f"Invent {20 + number} people who live in a small town." for number in range(num_streams)]
        return [
            fixed | {"messages": [{"role": "user", "content": text}], "seed": 1000 * seed + number}
            for number, text in enumerate(texts)
        ]

    url = f"{start()}/v1/chat/completions"
    yield "answers", {name: (url, partial(bodies, form)) for name, form in FORMS.items()}


def lora(start: Start, model: str, num_streams: int) -> Iterator[tuple[str, Cases]]:
    config = load_model_config(resolve_model(model).path)
    names = [f"adapter-{number}" for number in range(NUM_ADAPTERS)]
    words = TEXT.read_text().split()

    def bodies(models: Sequence[str], seed: int) -> list[dict[str, Any]]:
        fixed = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
        prompts = [" ".join(words[(seed * 100 + number) % 1000 :][:100]) for number in range(num_streams)]
        return [
            fixed | {"model": models[number % len(models)], "prompt": prompt, "seed": number}
            for number, prompt in enumerate(prompts)
        ]

    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(names):
            save_random_adapter(Path(folder, name), config, seed, ranks={"": RANK})
        plain = f"{start()}/v1/completions"
        adapted = f"{start(*(f'--lora-modules={name}={folder}/{name}' for name in names))}/v1/completions"
    yield (
        "requests use",
        {
            "no adapter slots": (plain, partial(bodies, [MODEL_NAME])),
            "no adapter": (adapted, partial(bodies, [MODEL_NAME])),
            "one adapter": (adapted, partial(bodies, names[:1])),
            f"{NUM_ADAPTERS} adapters": (adapted, partial(bodies, names)),
        },
    )


def speculation(start: Start, model: str, num_streams: int) -> Iterator[tuple[str, Cases]]:
    urls = {f"drafts: {mode}": f"{start('--speculative', mode)}/v1/completions" for mode in ("off", "auto")}
    passage = TEXT.read_text()[3000:4500]
    for how, prompt in (("twice", f"{passage}\n\n{passage}\n\n{passage[:200]}"), ("once", passage)):
        for temperature in (0.0, 0.8):
            body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 256, "ignore_eos": True}
            bodies = [body | {"temperature": temperature, "seed": 1}]
            cases: Cases = {name: (url, lambda seed, bodies=bodies: bodies) for name, url in urls.items()}
            yield f"sent {how}, temperature {temperature:g}", cases


FEATURES = {each.__name__: each for each in (structured, lora, speculation)}


def tokens_per_second(client: httpx.Client, url: str, bodies: Sequence[Mapping[str, Any]]) -> float:
    """Send requests at the same time, and return the output tokens per second of all of them."""

    def ask(body: Mapping[str, Any]) -> int:
        num_tokens: int = client.post(url, json=body).raise_for_status().json()["usage"]["completion_tokens"]
        return num_tokens

    start = time.perf_counter()
    with ThreadPoolExecutor(len(bodies)) as pool:
        num_tokens = sum(pool.map(ask, bodies))
    return num_tokens / (time.perf_counter() - start)


def main() -> int:
    options = {"streams": (32, "clients"), "rounds": (7, "of each case")}
    arguments = parse("features", __doc__, model="smollm2-135m", commands=list(FEATURES), **options)
    with ExitStack() as stack:
        limits = httpx.Limits(max_connections=arguments.streams)
        client = stack.enter_context(httpx.Client(timeout=300, trust_env=False, limits=limits))

        def start(*flags: str) -> str:
            return stack.enter_context(running_server([arguments.model, *flags]))[0]

        for title, cases in FEATURES[arguments.command](start, arguments.model, arguments.streams):
            rates: dict[str, list[float]] = {name: [] for name in cases}
            for number in range(arguments.rounds + 1):
                for name, (url, bodies) in cases.items():
                    rates[name].append(tokens_per_second(client, url, bodies(number)))
            medians = {name: statistics.median(found[1:]) for name, found in rates.items()}
            first = next(iter(medians.values()))
            rows = [(name, f"{rate:.0f}", f"{rate / first:.1%}") for name, rate in medians.items()]
            print_rows((title, "tokens/s", f"of {next(iter(medians))}"), rows)
    return 0


if __name__ == "__main__":
    run(main)
