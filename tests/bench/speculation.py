"""What n-gram speculation is worth where text repeats itself: `python -m tests.bench.speculation [MODEL]`.

One client asks for a long continuation of a passage of `english.txt` that it sends twice, and of one that it sends
once, from servers with `--speculative off` and `auto`, greedily and at temperature 0.8. Both must answer alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import httpx
from rich.console import Console
from rich.table import Column, Table

from tests.bench.quality import TEXT
from tests.bench.serve import MODEL_NAME, running_server

NUM_TOKENS = 256
REPEATS = 5  # of which the median counts, after one that is not timed
TEMPERATURES = (0.0, 0.8)


def prompts() -> dict[str, str]:
    passage = TEXT.read_text()[3000:4500]
    return {"sent twice": f"{passage}\n\n{passage}\n\n{passage[:200]}", "sent once": passage}


def answer(url: str, prompt: str, temperature: float) -> tuple[str, float]:
    """The text, and the seconds that it took."""
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
    """By prompt and temperature: the text, and the median of the seconds."""
    results = {}
    with running_server([*model, "--speculative", mode]) as (url, _):
        for name, prompt in prompts().items():
            for temperature in TEMPERATURES:
                runs = [answer(url, prompt, temperature) for _ in range(1 + REPEATS)]
                results[name, temperature] = runs[-1][0], statistics.median(seconds for _, seconds in runs[1:])
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.speculation", description=__doc__)
    parser.add_argument("model", nargs="*", metavar="MODEL", help="what to serve, if not the default model")
    arguments = parser.parse_args()
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
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
