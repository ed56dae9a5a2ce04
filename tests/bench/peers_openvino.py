"""OpenVINO GenAI's continuous batching behind a pipe: loads in, what came of each request out, as lines of JSON.

    python peers_openvino.py FOLDER MAX_NUM_SEQS

Runs in an environment of its own (`peers_setup.py`) and so imports nothing of the project.
"""

import json
import os
import sys
import time
from itertools import count
from typing import Any

import openvino_genai as ov  # type: ignore[import-not-found,unused-ignore]

CACHE_GB = 2


def main(folder: str, max_num_seqs: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library prints to standard output, too
    settings = ov.SchedulerConfig()
    settings.cache_size = CACHE_GB
    settings.max_num_seqs = max_num_seqs
    settings.enable_prefix_caching = False
    pipeline = ov.ContinuousBatchingPipeline(folder, settings, "CPU")
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(pipeline, json.loads(line))), file=answers, flush=True)


def run(pipeline: Any, load: dict[str, Any]) -> list[dict[str, Any]]:
    """All requests of a closed loop: as many as may run at a time are in the pipeline, and each makes room for one."""
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
    for request, prompt in zip(requests, load["prompts"], strict=True):  # counted when the clock no longer runs
        request["num_prompt_tokens"] = tokenizer.encode(prompt).input_ids.shape[1]
    return requests


def take(handle: Any, request: dict[str, Any]) -> bool:
    """Note the tokens that a step has brought, and whether the request is done."""
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
