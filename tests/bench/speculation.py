"""Measure the speed-up by n-gram speculation on repetitive text: `python -m tests.bench.speculation [MODEL]`.

One client requests a long continuation of a passage of `english.txt`, which its prompt contains twice or once, with
temperature 0 and 0.8, from servers with `--speculative off` and `auto`. Their answers must be identical.
"""

from __future__ import annotations

import statistics
import time

import httpx
from rich.console import Console
from rich.table import Column, Table

from tests.bench.quality import TEXT
from tests.bench.serve import MODEL_NAME, parse, run, running_server

NUM_TOKENS = 256
REPEATS = 5  # measured requests, after one that is not measured
TEMPERATURES = (0.0, 0.8)


def prompts() -> dict[str, str]:
    passage = TEXT.read_text()[3000:4500]
    return {"sent twice": f"{passage}\n\n{passage}\n\n{passage[:200]}", "sent once": passage}


def answer(url: str, prompt: str, temperature: float) -> tuple[str, float]:
    """Return the text of an answer, and the seconds that it took."""
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": temperature,
        "seed": 1,
        "ignore_eos": True,
    }
    start = time.perf_counter()
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=300, trust_env=False)
    seconds = time.perf_counter() - start
    text: str = response.raise_for_status().json()["choices"][0]["text"]
    return text, seconds


def measure(model: list[str], mode: str) -> dict[tuple[str, float], tuple[str, float]]:
    """Return the text and the median of the seconds, by prompt and temperature."""
    results = {}
    with running_server([*model, "--speculative", mode]) as (url, _):
        for name, prompt in prompts().items():
            for temperature in TEMPERATURES:
                runs = [answer(url, prompt, temperature) for _ in range(1 + REPEATS)]
                results[name, temperature] = runs[-1][0], statistics.median(seconds for _, seconds in runs[1:])
    return results


def main() -> int:
    arguments = parse("speculation", __doc__)
    off, on = (measure(arguments.model, mode) for mode in ("off", "auto"))
    columns = ("off (tokens/s)", "on (tokens/s)", "ratio", "same text")
    table = Table("passage", "temperature", *(Column(name, justify="right") for name in columns))
    for (name, temperature), (text, seconds) in off.items():
        other_text, other_seconds = on[name, temperature]
        rates = [f"{NUM_TOKENS / one:.0f}" for one in (seconds, other_seconds)]
        table.add_row(name, str(temperature), *rates, f"{seconds / other_seconds:.2f}", str(text == other_text))
    Console().print(table)
    return 0 if all(text == on[key][0] for key, (text, _) in off.items()) else 1


if __name__ == "__main__":
    run(main)
