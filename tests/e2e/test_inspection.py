"""What a real server tells of its requests: records, traces, timings, metrics and spans agree with each other."""

import concurrent.futures
import json
import random
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import StartServer
from tests.support.chrome_trace import check_trace, requests_in, slices_named
from tests.support.kv_cache_memory import kv_cache_flag
from tests.support.otlp_receiver import OTLPReceiver, attributes, seconds
from tests.support.server_process import COMPLETIONS, MODEL, REQUEST_SECONDS, ServerProcess
from tests.support.serving import wait_until
from tests.support.streams import Stream

SECRET = "The secret word is xylophone."
STORY = "Once upon a time in a land far away there lived a king who had a castle by the sea. " * 8


def read(server: ServerProcess, path: str) -> dict[str, Any]:
    response = server.get(f"/lightwell/v1/{path}")
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def complete(server: ServerProcess, prompt: str, name: str, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "ignore_eos": True, "temperature": 0} | fields
    response = server.http.post("/v1/completions", json=body, headers={"x-request-id": name})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


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
    assert [(choice["index"], choice["state"], choice["finish_reason"]) for choice in found] == [
        (0, "finished", "length"),
        (1, "finished", "length"),
    ]
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


def test_why_a_prefix_was_cached_or_not(server: ServerProcess) -> None:
    other_end = STORY[:300] + "But the queen was never seen again. " * 4
    for name, prompt, salt, result in (
        ("cold", STORY, "tales", "new"),
        ("warm", STORY, "tales", "found"),
        ("other-end", other_end, "tales", "diverged"),
        ("other-salt", STORY, "other tales", "other_salt"),
        ("short", "Hi", "tales", "too_short"),
    ):
        complete(server, prompt, name, cache_salt=salt)
        prefix = choices(server, name)[0]["prefix"]
        assert prefix["result"] == result
        if name == "warm":
            assert prefix["num_cached_tokens"] == prefix["num_reusable_tokens"] >= 32
        elif name == "other-end":
            tokens, told = (server.answer("/tokenize", {"prompt": text})["tokens"] for text in (other_end, STORY))
            position = next(index for index, pair in enumerate(zip(tokens, told, strict=False)) if pair[0] != pair[1])
            assert (prefix["position"], prefix["token_id"]) == (position, tokens[position])
            assert 0 < prefix["num_cached_tokens"] <= position


def test_the_blocks_and_the_queue(small_server: ServerProcess) -> None:
    """Two choices of one prompt share its blocks; when they have ended, the blocks are cached."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answer = pool.submit(complete, small_server, STORY, "blocks", n=2, max_tokens=300)
        wait_until(lambda: len(read(small_server, "requests?state=running")["data"]) == 2)
        others = []
        for number in (1, 2):
            others.append(pool.submit(complete, small_server, "Light", f"q{number}", lightwell={"explain": True}))
            wait_until(lambda number=number: read(small_server, "queue")["num_waiting"] == number)
        blocks, waiting = read(small_server, "blocks"), read(small_server, "queue")["data"]
        id = answer.result()["id"]
        ahead = [other.result()["lightwell"]["num_ahead"] for other in others]
    assert [choice["num_ahead"] for choice in waiting] == ahead == [0, 1]
    assert all(choice["waited"] > 0 and not choice["was_preempted"] for choice in waiting)
    assert {(owner["id"], owner["index"]) for owner in blocks["owners"]} == {(id, 0), (id, 1)}
    shared = [run for run in blocks["data"] if run["num_holders"] == 2]
    num_full = choices(small_server, "blocks")[0]["num_prompt_tokens"] // blocks["block_size"]
    assert num_full - 1 <= sum(run["num_blocks"] for run in shared) <= num_full
    assert all(run["is_cached"] for run in shared)
    held = sum(run["num_blocks"] for run in blocks["data"] if run["state"] == "held")
    assert held == blocks["num_used"] > num_full
    after = read(small_server, "blocks")
    assert after["num_used"] == 0
    assert {run["state"] for run in after["data"]} <= {"cached", "free", "unused"}
    assert sum(run["num_blocks"] for run in after["data"] if run["state"] == "cached") >= num_full


def test_the_stream_of_steps_misses_none(server: ServerProcess) -> None:
    steps: list[int] = []
    num_generated = 0
    with concurrent.futures.ThreadPoolExecutor(4) as pool, server.http.stream("GET", "/lightwell/v1/events") as events:
        lines = (line for line in events.iter_lines() if line.startswith("data: "))
        answers = [pool.submit(complete, server, "Light", f"s{number}", max_tokens=30) for number in range(4)]
        while num_generated < 120:
            event = json.loads(next(lines).removeprefix("data: "))
            assert event["num_lost"] == 0
            steps += [step["id"] for step in event["data"]]
            num_generated += sum(row["num_generated"] for step in event["data"] for row in step["rows"])
        for answer in answers:
            answer.result()
    assert num_generated == 120
    assert steps == list(range(steps[0], steps[0] + len(steps)))


def inspect(server: ServerProcess, **body: Any) -> dict[str, Any]:
    response = server.http.post("/lightwell/v1/inspect", json=body, timeout=REQUEST_SECONDS)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def test_inside_the_model(server: ServerProcess) -> None:
    """What was sent is computed again, token by token, while other requests run."""
    chat: dict[str, Any] = {"model": MODEL, "max_tokens": 30, "seed": 3, "temperature": 0.8, "top_p": 0.95}
    chat["messages"] = [{"role": "user", "content": "Name a city, its country and its river."}]
    chat["response_format"] = {"type": "json_object"}
    story = {"max_tokens": 30, "temperature": 1.1, "min_p": 0.02, "repetition_penalty": 1.1, "seed": 4, "n": 2}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        response = server.http.post("/v1/chat/completions", json=chat, headers={"x-request-id": "as-json"})
        assert response.status_code == 200, response.text
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
    answer = inspect(server, prompt="The capital of France is", layer=0, head=0)
    assert "".join(token["token"] for token in answer["tokens"]) == "The capital of France is"
    assert answer["positions"][-1]["layers"][-1]["lens"][0]["token"] == " Paris"
    for position, row in zip(answer["positions"], answer["attention"]["rows"], strict=True):
        assert len(row) == position["position"] + 1
        assert sum(row) == pytest.approx(1, abs=1e-4)


# Timings of a request: `"lightwell": {"explain": true}`.

MESSAGES = [{"role": "user", "content": "Tell me about light."}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 24, "n": 2},
    "/v1/chat/completions": {"messages": MESSAGES, "max_completion_tokens": 24, "stream": True},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 24},
    "/v1/responses": {"input": "Tell me about light.", "max_output_tokens": 24, "stream": True},
}


def explained(server: ServerProcess, path: str, **body: Any) -> dict[str, Any]:
    """Return the timings of a request, whose parts add up to the whole."""
    response = server.ask(path, {"lightwell": {"explain": True}, **body})
    assert response.status_code == 200, response.text
    events = (
        [response.json()]
        if not body.get("stream")
        else [
            json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data: {")
        ]
    )
    found = [event.get("response") or event for event in events]
    (timings,) = [event["lightwell"] for event in found if "lightwell" in event]
    assert sum(timings["seconds"].values()) == pytest.approx(timings["wall_s"], rel=0.02)
    assert all(part >= 0 for part in timings["seconds"].values()), timings
    own: dict[str, Any] = timings
    return own


def test_the_timings_of_a_request_add_up(server: ServerProcess) -> None:
    for path, body in BODIES.items():
        timings = explained(server, path, **body, ignore_eos=True)
        assert timings["num_output_tokens"] == 24
        assert timings["seconds"]["decode"] > timings["seconds"]["detokenizing"]
        assert timings["num_chunks"] >= 1
        assert timings["num_preemptions"] == timings["seconds"]["preempted"] == 0
    inputs = [f"Sentence number {number} is about light." for number in range(150)]
    timings = explained(server, "/v1/embeddings", input=inputs)
    assert timings["num_output_tokens"] == timings["seconds"]["decode"] == 0
    assert timings["seconds"]["queue"] > timings["seconds"]["prefill"] > 0, "of the input that finished last"
    cold, warm = (
        explained(server, COMPLETIONS, prompt="What was here before? " * 40, max_tokens=2, cache_salt="account")
        for _ in range(2)
    )
    assert (cold["num_cached_tokens"], warm["num_cached_tokens"] >= 32) == (0, True)
    assert warm["num_cached_tokens"] + warm["num_computed_tokens"] == cold["num_computed_tokens"]
    assert "lightwell" not in server.answer(COMPLETIONS, {"prompt": "a", "max_tokens": 2})


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


@pytest.mark.long
def test_spans_agree_with_the_records(start_server: StartServer) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with OTLPReceiver() as receiver:
        server = start_server(f"--otlp-endpoint={receiver.url}", OTEL_BSP_SCHEDULE_DELAY="50", OTEL_SERVICE_NAME="mine")
        body = {"prompt": "Once upon a time", "max_tokens": 24, "ignore_eos": True}
        answer = server.http.post("/v1/completions", json=body, headers={"traceparent": parent}).json()
        (root,) = receiver.wait_for_roots()
    assert receiver.resource["service.name"] == "mine"
    assert root.trace_id.hex() == parent.split("-")[1]
    found = attributes(root.attributes)
    assert found["gen_ai.response.id"] == answer["id"]
    assert found["gen_ai.usage.output_tokens"] == 24
    (choice,) = choices(server, answer["id"])
    stages = {child.name: seconds(child) for child in receiver.children(root)}
    assert sum(stages.values()) == pytest.approx(seconds(root), abs=1e-6)
    # The offset between the clocks is measured twice.
    assert stages.pop("writing") > 0
    names = ("tokenizing", "queue", "prefill", "decode", "preempted")
    assert stages == pytest.approx(
        {name: choice["seconds"][name] for name in names if choice["seconds"][name]}, abs=1e-3
    )


# Metrics.


def samples(server: ServerProcess) -> dict[tuple[str, str], float]:
    """Return the server's own metrics by name, and the value of the one label that counters of requests have."""
    own = ("model_name", "engine")
    return {
        (sample.name.removeprefix("lightwell_"), ",".join(v for k, v in sample.labels.items() if k not in own)): (
            sample.value
        )
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
        ("prompt_tokens_total", ""): num_prompt_tokens,
        ("prompt_tokens_cached_total", ""): num_cached,
        ("prompt_tokens_by_source_total", "local_cache_hit"): num_cached,
        ("prompt_tokens_by_source_total", "local_compute"): num_prompt_tokens - num_cached,
        ("request_success_total", "length"): 6,
        ("request_success_total", "stop"): 1,
        ("request_success_total", "abort"): 0,
        ("e2e_request_latency_seconds_count", ""): 7,
        ("request_prompt_tokens_count", ""): 7,
        ("time_to_first_token_seconds_count", ""): 7,
        ("request_params_n_count", ""): 4,
        ("request_params_n_sum", ""): 3 * 2 + 1,
        ("request_prompt_tokens_sum", ""): num_prompt_tokens,
        ("request_params_max_tokens_sum", ""): 6 * 7 + 50,
    }
    assert {key: growth[key] for key in expected} == expected
    assert growth["generation_tokens_total", ""] >= 6 * 7 + 1


def test_gauges_during_and_after_a_request(small_server: ServerProcess) -> None:
    aborted = {"finished_reason": "abort"}
    num_aborts = small_server.metric("lightwell_request_success_total", **aborted)
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 900, "ignore_eos": True, "n": 3, "stream": True}
    with small_server.http.stream("POST", COMPLETIONS, json=body) as response:
        lines = response.iter_lines()  # closing the iterator would close the connection
        next(lines)
        wait_until(lambda: (small_server.num_running, small_server.num_waiting) == (2, 1))
        assert small_server.metric("lightwell_num_requests_waiting_by_reason", reason="capacity") == 1
        assert 0 < small_server.metric("lightwell_kv_cache_usage_perc") < 1
    wait_until(lambda: small_server.is_idle)
    assert small_server.metric("lightwell_request_success_total", **aborted) == num_aborts + 3
    assert httpx.get(f"{small_server.url}/metrics").text.count("# TYPE lightwell_num_requests_running gauge") == 1
