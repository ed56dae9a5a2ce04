"""Measure what streams pay for a reader of the engine's steps: `python -m tests.bench.events [MODEL] [--streams 32]`.

Clients stream answers of 128 tokens, alone and beside one reader of `/lightwell/v1/events`. Rounds alternate on the
same server, with the same prompts and without a prefix cache, so that both cases compute the same; the median of the
rounds counts. The reader is in this process, whose processor time counts, too.
"""

from __future__ import annotations

import argparse
import sys
import threading
from dataclasses import replace

import httpx

from server.cli.bench import run_benchmark
from server.cli.load_generator import LoadOptions
from tests.bench.serve import MODEL_NAME, running_server
from tests.bench.streams import compare


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.events",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="*", metavar="MODEL", help="model to serve; default: that of lightwell serve")
    parser.add_argument("--streams", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="rounds of each case; default: %(default)s")
    arguments = parser.parse_args()
    with running_server([*arguments.model, "--no-enable-prefix-caching"]) as (url, _):
        load = LoadOptions(
            url=url,
            model=MODEL_NAME,
            num_requests=2 * arguments.streams,
            concurrency=arguments.streams,
            input_len=32,
            output_len=128,
        )

        def alone(number: int) -> float:
            report = run_benchmark(replace(load, seed=number))
            assert report.num_completed == load.num_requests, report.errors
            return report.output_tokens_per_second

        def beside_a_reader(number: int) -> float:
            with Reader(url):
                return alone(number)

        compare({"alone": alone, "beside a reader": beside_a_reader}, arguments.rounds)
    return 0


class Reader:
    """A thread that reads the stream of steps."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_done = False
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._thread.is_alive(), "it has read until now"
        self._is_done = True
        body = {"model": MODEL_NAME, "prompt": "The last step", "max_tokens": 1}
        httpx.post(f"{self._url}/v1/completions", json=body, timeout=60, trust_env=False).raise_for_status()
        self._thread.join()

    def _read(self) -> None:
        with httpx.stream("GET", f"{self._url}/lightwell/v1/events", timeout=60, trust_env=False) as response:
            response.raise_for_status()
            for _ in response.iter_raw():
                if self._is_done:
                    return


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
