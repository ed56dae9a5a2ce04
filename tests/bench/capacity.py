"""Measure the processor time of the API process for a streamed chat completion, in front of a fake engine.

    python -m tests.bench.capacity api [MODEL]
    python -m tests.bench.capacity workers [MODEL]

`api` fits what a request, a token of its prompt and one of its answer cost, and says how many API processes some loads
need. `workers` compares a server of one API process with a coordinator and workers, which get all requests
(--api-server-count). Of MODEL, the tokenizer and the template are used.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from server.model_paths import resolve_model
from server.parts.bench.bench import run_benchmark
from server.parts.bench.commands import LoadOptions
from tests.bench.serve import parse, print_rows
from tests.support.api_process import api_process
from tests.support.fake_engine import FakeEngineConfig
from tests.support.serving import own_address

STEP_SECONDS = 0.02  # of the fake engine
CONCURRENCY = 64
TARGET_LOAD = 0.7  # of a processor core, that an API process is to take
CASES = ((32, 1), (32, 16), (32, 64), (32, 256), (512, 16), (2048, 16))  # words of a prompt, tokens of an answer
# Mean tokens in and out: of the Azure LLM inference traces of 2023 (Splitwise, ISCA 2024), and of BurstGPT (KDD 2025).
LOADS = {"conversation": (1155, 211), "burst": (755, 354), "code": (2048, 28)}
ROUNDS = 3
NUM_WORKERS = 6  # beside which the coordinator keeps no connection for itself


def measure(
    model: Path, cases: Sequence[tuple[int, int]], num_requests: int, num_workers: int = 0
) -> list[tuple[int, float, float]]:
    """Return for each case the tokens of a prompt, and the seconds of the first process and of others for a request."""
    found = []
    with own_address() as address, tempfile.TemporaryDirectory() as folder:
        limits = {"max_model_len": 1 << 15, "max_num_seqs": CONCURRENCY, "vocab_size": 1 << 16}
        replies = {"reply": list(range(1000, 1128)), "endless": True, "step_seconds": STEP_SECONDS}
        engine = FakeEngineConfig(address=address, **limits, **replies)
        with api_process(engine, model, Path(folder), dies=True, num_workers=num_workers) as api:
            api.wait_until_ready()
            processes = [psutil.Process(each.pid) for each in (api.process, *api.workers)]
            for seed, (words, tokens) in enumerate(cases):
                size = {"num_requests": num_requests, "input_len": words, "output_len": tokens}
                load = LoadOptions(url=api.url, endpoint="chat", concurrency=CONCURRENCY, seed=seed, **size)
                run_benchmark(replace(load, num_requests=2 * CONCURRENCY, output_len=1))  # warm-up
                before = [sum(each.cpu_times()[:2]) for each in processes]
                report = run_benchmark(load)
                assert report.num_completed == num_requests, report.errors
                first, *others = (
                    sum(each.cpu_times()[:2]) - start for each, start in zip(processes, before, strict=True)
                )
                found.append((report.input_tokens // num_requests, first / num_requests, sum(others) / num_requests))
    return found


def api(model: Path, num_requests: int) -> None:
    found = measure(model, CASES, num_requests)
    work = np.array([(1, prompt, answer) for (prompt, _, _), (_, answer) in zip(found, CASES, strict=True)], float)
    seconds = np.array([used for _, used, _ in found])
    costs = np.linalg.lstsq(work / seconds[:, None], np.ones(len(work)), rcond=None)[0]
    rows = zip(work, 1e3 * seconds, 1e3 * work @ costs, strict=True)
    print_rows(
        ("prompt tokens", "answer tokens", "ms", "fitted"),
        [[f"{prompt:.0f}", f"{answer:.0f}", f"{ms:.2f}", f"{fitted:.2f}"] for (_, prompt, answer), ms, fitted in rows],
    )
    print("{:.2f} ms for a request, {:.2f} µs for a token in, {:.1f} µs out".format(*costs * (1e3, 1e6, 1e6)))
    for name, (tokens_in, tokens_out) in LOADS.items():
        one = costs @ (1, tokens_in, tokens_out)
        count = 1000 * one / TARGET_LOAD
        print(f"{name}: {1e3 * one:.1f} ms, {count:.0f} API processes for 1,000 requests per second")


def workers(model: Path, num_requests: int) -> None:
    cases = [(32, tokens) for tokens in (1, 64, 256)]
    rounds = [[measure(model, cases, num_requests, num) for num in (0, NUM_WORKERS)] for _ in range(ROUNDS)]
    rows = []
    for index, (_, tokens) in enumerate(cases):
        costs = [(alone[index][1], several[index][1], several[index][2]) for alone, several in rounds]
        rows.append([str(tokens), *(f"{1e3 * statistics.median(each):.2f}" for each in zip(*costs, strict=True))])
    print_rows(("answer tokens", "one process, ms", "coordinator, ms", "workers, ms"), rows)


def main() -> None:
    options = {"requests": (512, "of each case")}
    arguments = parse("capacity", __doc__, model="smollm2-135m", commands=("api", "workers"), **options)
    {"api": api, "workers": workers}[arguments.command](resolve_model(arguments.model).path, arguments.requests)


if __name__ == "__main__":
    main()
