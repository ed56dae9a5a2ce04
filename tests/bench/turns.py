"""Measure how much sooner the second turn of a chat begins: `python -m tests.bench.turns [MODEL] [--url URL]`.

The first message has as many words as asked for. The second turn sends the chat with the answer and a short message.
With `--url`, a running server is measured, Lightwell or another.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from contextlib import ExitStack
from typing import Any

import httpx

from tests.bench.quality import TEXT
from tests.bench.serve import MODEL_NAME, parse, print_rows, run, running_server


def turn(client: httpx.Client, messages: list[dict[str, str]]) -> tuple[float, str]:
    """Return the seconds until the first piece of the answer, and the answer, which is added to the messages."""
    body: dict[str, Any] = {"model": MODEL_NAME, "messages": messages, "max_tokens": 32, "temperature": 0}
    started, first, text = time.perf_counter(), 0.0, ""
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True, "ignore_eos": True}) as response:
        for line in response.raise_for_status().iter_lines():
            if line.startswith("data: {") and (choices := json.loads(line[6:])["choices"]):
                piece = choices[0]["delta"].get("content") or ""
                first = first or (time.perf_counter() - started if piece else 0.0)
                text += piece
    messages.append({"role": "assistant", "content": text})
    return first, text


def main() -> None:
    options = {"url": ("", "a running server"), "words": (3000, "of the first message"), "rounds": (3, "chats")}
    arguments = parse("turns", __doc__, model="smollm2-135m", **options)
    words = TEXT.read_text().split()
    seconds: list[tuple[float, float]] = []
    with ExitStack() as stack:
        url = arguments.url or stack.enter_context(running_server([arguments.model, *arguments.flags]))[0]
        client = stack.enter_context(httpx.Client(base_url=url, timeout=600, trust_env=False))
        for number in range(arguments.rounds):
            chosen = random.Random(number).choices(words, k=arguments.words)
            messages = [{"role": "user", "content": " ".join(chosen)}]
            first, _ = turn(client, messages)
            messages.append({"role": "user", "content": "Say that again, in one sentence."})
            seconds.append((first, turn(client, messages)[0]))
    first, second = (statistics.median(each) for each in zip(*seconds, strict=True))
    print_rows(
        ("turn", "first token (ms)", "sooner"),
        [("1", f"{1000 * first:.0f}", ""), ("2", f"{1000 * second:.0f}", f"{first / second:.1f}")],
    )


if __name__ == "__main__":
    run(main)
