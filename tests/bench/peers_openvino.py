"""Run OpenVINO GenAI's continuous batching on loads from standard input; write the results of each as a line of JSON.

    python peers_openvino.py FOLDER MAX_NUM_SEQS

It runs in its own environment (`peers_setup.py`), so it imports nothing of the project.
"""

import json
import os
import sys
import time
from itertools import count
from typing import Any

import openvino_genai as ov

CACHE_GB = 2


def main(folder: str, max_num_seqs: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library prints to standard output too
    settings = ov.SchedulerConfig()
    settings.cache_size = CACHE_GB
    settings.max_num_seqs = max_num_seqs
    settings.enable_prefix_caching = False
    pipeline = ov.ContinuousBatchingPipeline(folder, settings, "CPU")
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(pipeline, json.loads(line))), file=answers, flush=True)


def run(pipeline: Any, load: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the requests of a closed loop, with `concurrency` requests in the pipeline; return an Exchange of each."""
    tokenizer, settings = pipeline.get_tokenizer(), generation_config(load)
    numbers, waiting = count(), list(reversed(load["prompts"]))
    running: list[tuple[Any, dict[str, Any]]] = []
    requests: list[dict[str, Any]] = []
    while waiting or running:
        while waiting and len(running) < load["concurrency"]:
            requests.append({"start": time.perf_counter(), "chunks": []})
            running.append((pipeline.add_request(next(numbers), waiting.pop(), settings), requests[-1]))
        pipeline.step()
        running = [(handle, request) for handle, request in running if not take(handle, request)]
    for request, prompt in zip(requests, load["prompts"], strict=True):  # outside of the measured time
        counts = tokenizer.encode(prompt).input_ids.shape[1], sum(count for _, count in request["chunks"])
        request["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), counts, strict=True))
    return requests


def take(handle: Any, request: dict[str, Any]) -> bool:
    """Record the tokens of the last step, and return whether the request is finished."""
    now = time.perf_counter()
    while handle.can_read():
        for output in handle.read().values():
            request["chunks"].append((now, len(output.generated_ids)))
    request["end"] = now
    return bool(handle.get_status() == ov.GenerationStatus.FINISHED)


def generation_config(load: dict[str, Any]) -> Any:
    settings = ov.GenerationConfig()
    settings.max_new_tokens = load["output_len"]
    settings.ignore_eos = True
    settings.apply_chat_template = False
    settings.do_sample = load["temperature"] > 0
    if settings.do_sample:
        settings.temperature = load["temperature"]
    return settings


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
