"""What a real server tells of its requests: records, traces, timings, metrics and spans agree with each other."""

import concurrent.futures
import random
from typing import Any

import pytest

from tests.e2e.conftest import StartServer
from tests.support.chrome_trace import check_trace, requests_in, slices_named
from tests.support.kv_cache_memory import kv_cache_flag
from tests.support.otlp_receiver import OTLPReceiver, attributes, seconds
from tests.support.server_process import CHAT, COMPLETIONS, ServerProcess
from tests.support.serving import wait_until
from tests.support.streams import Stream

SECRET = "The secret word is xylophone."
STORY = "Once upon a time in a land far away there lived a king who had a castle by the sea. " * 8


def read(server: ServerProcess, path: str) -> dict[str, Any]:
    content: dict[str, Any] = server.get(f"/lightwell/v1/{path}").raise_for_status().json()
    return content


def complete(server: ServerProcess, prompt: str, name: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, "temperature": 0} | fields
    return server.answer(COMPLETIONS, body, **{"x-request-id": name})


def choices(server: ServerProcess, id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read(server, f"requests/{id}")["choices"]
    return found


def check_sums(choice: dict[str, Any]) -> None:
    assert sum(choice["seconds"].values()) == pytest.approx(choice["wall_s"], abs=1e-6)
    assert min(choice["seconds"].values()) >= -1e-6, choice


def test_a_request_its_steps_and_its_trace(server: ServerProcess) -> None:
    last = max((step["id"] for step in read(server, "steps?limit=1")["data"]), default=0)
    answer = complete(server, SECRET, "a-request", n=2, cache_salt="own")
    found = choices(server, "a-request")
    assert found == choices(server, answer["id"])
    ends = [(choice["index"], choice["state"], choice["finish_reason"]) for choice in found]
    assert ends == [(0, "finished", "length"), (1, "finished", "length")]
    steps = read(server, f"steps?after={last}&limit=1000")
    assert (steps["num_lost"], steps["has_more"]) == (0, False)
    rows = [(step["id"], row) for step in steps["data"] for row in step["rows"] if row["id"] == answer["id"]]
    for index, choice in enumerate(found):
        check_sums(choice)
        assert choice["num_prompt_tokens"] == answer["usage"]["prompt_tokens"]
        own = [row for _, row in rows if row["index"] == index]
        assert sum(row["num_generated"] for row in own) == choice["num_output_tokens"] == 12
        assert sum(row["num_accepted"] for row in own) == choice["num_accepted_tokens"]
        computed = {(step, row["position"], row["num_tokens"]) for step, row in rows if row["index"] == index}
        assert {(chunk["step"], chunk["position"], chunk["num_tokens"]) for chunk in choice["chunks"]} <= computed
    page = server.get("/lightwell/v1/requests/a-request").text + server.get("/lightwell/v1/requests").text
    assert "xylophone" not in page
    assert answer["choices"][0]["text"].strip()[:8] not in page

    trace = read(server, "requests/a-request/trace")
    check_trace(trace)
    assert trace["otherData"]["is_complete"]
    for (whole, *parts), choice in zip(requests_in(trace), found, strict=True):
        assert whole["dur"] == pytest.approx(1e6 * choice["wall_s"], abs=2)
        stages = dict.fromkeys(choice["seconds"], 0)
        for part in parts:
            if part["name"] != "chunk":
                stages[part["name"]] += part["dur"]
        assert sum(stages.values()) == whole["dur"]
        assert stages == pytest.approx({name: 1e6 * time for name, time in choice["seconds"].items()}, abs=4)
        assert [part["args"] for part in parts if part["name"] == "chunk"] == choice["chunks"]
    by_id = {step["id"]: step for step in read(server, "steps?limit=1000")["data"]}
    traced = {event["args"]["id"]: event for event in slices_named(trace, "step")}
    assert {step for step, _ in rows} <= set(traced)
    for id, event in traced.items():
        assert event["dur"] == pytest.approx(1e6 * sum(by_id[id]["seconds"].values()), abs=2)
        assert event["args"]["generated_tokens"] == sum(row["num_generated"] for row in by_id[id]["rows"])


def test_the_limits_of_the_engine(server: ServerProcess) -> None:
    engine, blocks = read(server, "engine"), read(server, "blocks?limit=1")
    assert (engine["device"], engine["max_num_seqs"], engine["max_model_len"]) == ("cpu", 64, 4096)
    assert (engine["num_blocks"], engine["block_size"]) == (blocks["num_blocks"], blocks["block_size"])
    block_bytes = engine["kv_cache_bytes"] / engine["num_blocks"]
    assert 256 << 20 >= engine["kv_cache_bytes"] > (256 << 20) - block_bytes
    assert 135e6 / 2 < engine["weight_bytes"] < 4 * 135e6


def inspect(server: ServerProcess, **body: Any) -> dict[str, Any]:
    content: dict[str, Any] = server.http.post("/lightwell/v1/inspect", json=body).raise_for_status().json()
    return content


def test_inside_the_model(server: ServerProcess) -> None:
    """What was sent is computed again, token by token, while other requests run."""
    chat: dict[str, Any] = {"max_tokens": 30, "seed": 3, "temperature": 0.8, "top_p": 0.95}
    chat["messages"] = [{"role": "user", "content": "Name a city, its country and its river."}]
    chat["response_format"] = {"type": "json_object"}
    story = {"max_tokens": 30, "temperature": 1.1, "min_p": 0.02, "repetition_penalty": 1.1, "seed": 4, "n": 2}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        server.answer(CHAT, chat, **{"x-request-id": "as-json"})
        complete(server, STORY, "a-story", **story)
        others = [pool.submit(complete, server, STORY, f"beside-{number}", max_tokens=100) for number in range(2)]
        for name, index in (("as-json", 0), ("a-story", 1)):
            whole = inspect(server, id=name, index=index)
            first = whole["num_prompt_tokens"] - 1
            answer = inspect(server, id=name, index=index, start=first, end=whole["num_tokens"] - 1, top=1)
            assert answer["is_equal"], answer["positions"][-1]
            assert len(answer["positions"]) == whole["num_tokens"] - 1 - first
            assert all(position["is_equal"] for position in answer["positions"])
            assert len(answer["positions"][0]["layers"]) == answer["num_layers"]
        stages = [stage["name"] for stage in inspect(server, id="as-json")["sampling"]["stages"]]
        assert stages == ["logits", "grammar", "temperature", "top_p"]
        for other in others:
            assert other.result()["usage"]["completion_tokens"] == 100
    answer = inspect(server, prompt="The capital of France is")
    assert "".join(token["token"] for token in answer["tokens"]) == "The capital of France is"
    assert answer["positions"][-1]["layers"][-1]["lens"][0]["token"] == " Paris"


# Timings of a request: `"lightwell": {"explain": true}`.


def explained(server: ServerProcess, path: str, **body: Any) -> dict[str, Any]:
    """Return the timings of a request, whose parts add up to the whole."""
    timings: dict[str, Any] = server.answer(path, {"lightwell": {"explain": True}, **body})["lightwell"]
    assert sum(timings["seconds"].values()) == pytest.approx(timings["wall_s"], rel=0.02)
    assert all(part >= 0 for part in timings["seconds"].values()), timings
    return timings


def test_the_timings_of_a_request_add_up(server: ServerProcess) -> None:
    timings = explained(server, COMPLETIONS, prompt="Once upon a time", max_tokens=24, n=2, ignore_eos=True)
    assert timings["num_output_tokens"] == 24
    assert timings["seconds"]["decode"] > timings["seconds"]["detokenizing"]
    assert timings["num_chunks"] >= 1
    assert timings["num_preemptions"] == timings["seconds"]["preempted"] == 0
    inputs = [f"Sentence number {number} is about light." for number in range(150)]
    timings = explained(server, "/v1/embeddings", input=inputs)
    assert timings["num_output_tokens"] == timings["seconds"]["decode"] == 0
    assert timings["seconds"]["queue"] > timings["seconds"]["prefill"] > 0, "of the input that finished last"
    again: dict[str, Any] = {"prompt": "What was here before? " * 40, "max_tokens": 2, "cache_salt": "account"}
    cold, warm = (explained(server, COMPLETIONS, **again) for _ in range(2))
    assert (cold["num_cached_tokens"], warm["num_cached_tokens"] >= 32) == (0, True)
    assert warm["num_cached_tokens"] + warm["num_computed_tokens"] == cold["num_computed_tokens"]
    assert "lightwell" not in server.answer(COMPLETIONS, {"prompt": "a", "max_tokens": 2})
    streamed = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
    for path in (CHAT, "/v1/messages"):
        assert server.ask(path, streamed | {"lightwell": {"explain": True}}).text.count('"wall_s":') == 1


@pytest.mark.long
@pytest.mark.checklist("D10")
def test_a_preempted_request(start_server: StartServer) -> None:
    """Two requests need more blocks than there are. Their spans arrive although the server is stopped."""
    with OTLPReceiver() as receiver:
        flags = ("--max-model-len=512", kv_cache_flag(12), "--speculative=off", f"--otlp-endpoint={receiver.url}")
        server = start_server(*flags, OTEL_BSP_SCHEDULE_DELAY="600000")
        body = {"prompt": "Light", "max_tokens": 480, "ignore_eos": True}
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: explained(server, COMPLETIONS, **body), range(2)))
        assert sorted(timings["num_preemptions"] for timings in both) == [0, 1]
        for timings in both:
            assert (timings["seconds"]["preempted"] > 0) == (timings["num_preemptions"] > 0)
        ended = next(choice for choice in read(server, "requests")["data"] if choice["num_preemptions"])
        (choice,) = choices(server, ended["id"])
        check_sums(choice)
        assert choice["preemptions"][0]["resumed"] > choice["preemptions"][0]["at"]
        trace = read(server, f"requests/{ended['id']}/trace")
        check_trace(trace)
        (preempted,) = slices_named(trace, "preempted")
        assert preempted["dur"] == pytest.approx(1e6 * choice["seconds"]["preempted"], abs=100)
        assert receiver.requests == []
        server.signal(15)
        roots = receiver.wait_for_roots(2)
        wait_until(lambda: server.process.poll() is not None)
        assert server.process.returncode == 0
        for root in roots:
            count = attributes(root.attributes)["lightwell.num_preemptions"]
            names = [child.name for child in receiver.children(root)]
            assert (names.count("preempted"), names.count("decode")) == (count, count + 1)
            assert sum(map(seconds, receiver.children(root))) == pytest.approx(seconds(root), abs=1e-6)


# Metrics.


def samples(server: ServerProcess) -> dict[tuple[str, ...], float]:
    """Return the server's own metrics by name, and the values of their labels."""
    own = ("model_name", "engine")
    return {
        (sample.name.removeprefix("lightwell_"), *(v for k, v in sample.labels.items() if k not in own)): sample.value
        for family in server.metrics().values()
        for sample in family.samples
        if sample.name.startswith("lightwell_")
    }


@pytest.mark.checklist("D10")
def test_counters_match_the_requests(server: ServerProcess) -> None:
    """The requests are three prompts with two choices each, and a stream that ends at a stop string."""
    rng = random.Random(3)
    before = samples(server)
    prompts = [[rng.randrange(1000, 40000) for _ in range(length)] for length in (40, 70, 5)]
    server.answer(COMPLETIONS, {"prompt": prompts, "n": 2, "max_tokens": 7, "ignore_eos": True})
    stops = ["e", "a", " ", "\n"]
    fields = {"prompt": prompts[0], "max_tokens": 50, "stop": stops, "temperature": 0, "ignore_eos": True}
    stream = Stream(server, fields).result()
    assert stream.chunks[-1]["choices"][0]["finish_reason"] == "stop"
    wait_until(lambda: server.is_idle)
    growth = {key: value - before.get(key, 0) for key, value in samples(server).items()}

    num_prompt_tokens = 2 * (40 + 70 + 5) + 40
    # The second choice of a prompt finds the first one's full blocks, and so does the stream.
    num_cached = 32 + 64 + 32
    expected = {
        ("prompt_tokens_total",): num_prompt_tokens,
        ("prompt_tokens_cached_total",): num_cached,
        ("prompt_tokens_by_source_total", "local_cache_hit"): num_cached,
        ("prompt_tokens_by_source_total", "local_compute"): num_prompt_tokens - num_cached,
        ("request_success_total", "length"): 6,
        ("request_success_total", "stop"): 1,
        ("request_success_total", "abort"): 0,
    }
    assert {key: growth[key] for key in expected} == expected
    assert growth["generation_tokens_total",] >= 6 * 7 + 1
