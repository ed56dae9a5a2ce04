"""What the engine has recorded, read over HTTP from a real server with a real model."""

import concurrent.futures
import json
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import StartServer
from tests.support.chrome_trace import check_trace, requests_in, slices_named
from tests.support.kv_cache_memory import kv_cache_flag
from tests.support.server_process import ServerProcess
from tests.support.serving import wait_until

SECRET = "The secret word is xylophone."
STORY = "Once upon a time in a land far away there lived a king who had a castle by the sea. " * 8


def read(server: ServerProcess, path: str, **headers: str) -> dict[str, Any]:
    response = server.get(f"/lightwell/v1/{path}", **headers)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def complete(server: ServerProcess, prompt: str, name: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, "temperature": 0} | fields
    response = server.http.post("/v1/completions", json=body, headers={"x-request-id": name})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def choices(server: ServerProcess, id: str, **headers: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read(server, f"requests/{id}", **headers)["choices"]
    return found


def check_sums(choice: dict[str, Any]) -> None:
    assert sum(choice["seconds"].values()) == pytest.approx(choice["wall_s"], abs=1e-6)
    assert min(choice["seconds"].values()) >= -1e-6, choice


def test_a_request_and_its_steps(server: ServerProcess) -> None:
    last = max((step["id"] for step in read(server, "steps?limit=1")["data"]), default=0)
    answer = complete(server, SECRET, "a-request", n=2, cache_salt="own")
    usage = answer["usage"]
    found = choices(server, "a-request")
    assert found == choices(server, answer["id"])
    assert [(choice["index"], choice["state"], choice["finish_reason"]) for choice in found] == [
        (0, "finished", "length"),
        (1, "finished", "length"),
    ]
    for choice in found:
        check_sums(choice)
        assert choice["num_prompt_tokens"] == usage["prompt_tokens"]
        assert choice["num_output_tokens"] == 12
    steps = read(server, f"steps?after={last}&limit=1000")
    assert (steps["num_lost"], steps["has_more"]) == (0, False)
    rows = [(step["id"], row) for step in steps["data"] for row in step["rows"] if row["id"] == answer["id"]]
    for index in (0, 1):
        own = [row for _, row in rows if row["index"] == index]
        assert sum(row["num_generated"] for row in own) == 12
        assert sum(row["num_accepted"] for row in own) == found[index]["num_accepted_tokens"]
        computed = [(step, row["position"], row["num_tokens"]) for step, row in rows if row["index"] == index]
        chunks = [(chunk["step"], chunk["position"], chunk["num_tokens"]) for chunk in found[index]["chunks"]]
        assert set(chunks) <= set(computed)
    for step in steps["data"]:
        assert {"schedule", "forward", "sample", "update"} <= set(step["seconds"])
        assert sum(row["num_tokens"] for row in step["rows"]) > 0
    page = server.get("/lightwell/v1/requests/a-request").text + server.get("/lightwell/v1/requests").text
    assert "xylophone" not in page
    assert answer["choices"][0]["text"].strip()[:8] not in page


def test_the_limits_of_the_engine(server: ServerProcess) -> None:
    engine = read(server, "engine")
    assert (engine["device"], engine["max_num_seqs"], engine["max_model_len"]) == ("cpu", 64, 4096)
    assert engine["max_num_batched_tokens"] >= engine["max_num_seqs"]
    blocks, steps = read(server, "blocks?limit=1"), read(server, "steps?limit=1")
    assert (engine["num_blocks"], engine["block_size"]) == (blocks["num_blocks"], blocks["block_size"])
    assert engine["engine"] == blocks["engine"] == steps["engine"]
    block_bytes = engine["kv_cache_bytes"] / engine["num_blocks"]
    assert 256 << 20 >= engine["kv_cache_bytes"] > (256 << 20) - block_bytes
    assert 135e6 / 2 < engine["weight_bytes"] < 4 * 135e6
    assert engine["available_bytes"] > 0


def test_the_trace_of_a_request(server: ServerProcess) -> None:
    """What it says is what the request and the steps say, and its stages fill the wall time."""
    answer = complete(server, "A bird sang in the old garden. " * 20, "traced", cache_salt="traced", n=2)
    trace = read(server, "requests/traced/trace")
    check_trace(trace)
    assert trace["otherData"]["is_complete"]
    found = choices(server, "traced")
    for (whole, *parts), choice in zip(requests_in(trace), found, strict=True):
        assert whole["args"]["id"] == answer["id"]
        assert whole["dur"] == pytest.approx(1e6 * choice["wall_s"], abs=2)
        stages = {name: 0 for name in choice["seconds"]}
        for part in parts:
            if part["name"] != "chunk":
                stages[part["name"]] += part["dur"]
        assert sum(stages.values()) == whole["dur"]
        assert stages == pytest.approx({name: 1e6 * seconds for name, seconds in choice["seconds"].items()}, abs=4)
        chunks = [part["args"] for part in parts if part["name"] == "chunk"]
        assert chunks == choice["chunks"]
    steps = {step["id"]: step for step in read(server, "steps?limit=1000")["data"]}
    own = [step for step in steps.values() if any(row["id"] == answer["id"] for row in step["rows"])]
    traced = {event["args"]["id"]: event for event in slices_named(trace, "step")}
    assert {step["id"] for step in own} <= set(traced)
    for id, event in traced.items():
        assert event["dur"] == pytest.approx(1e6 * sum(steps[id]["seconds"].values()), abs=2)
        assert event["args"]["generated_tokens"] == sum(row["num_generated"] for row in steps[id]["rows"])
    assert len(slices_named(trace, "forward")) == len(traced)
    recent = read(server, "trace?seconds=60")
    check_trace(recent)
    assert set(traced) <= {event["args"]["id"] for event in slices_named(recent, "step")}


def test_why_a_prefix_was_cached_or_not(server: ServerProcess) -> None:
    for name, prompt, salt in (
        ("cold", STORY, "tales"),
        ("warm", STORY, "tales"),
        ("other-end", STORY[:300] + "But the queen was never seen again. " * 4, "tales"),
        ("other-salt", STORY, "other tales"),
        ("short", "Hi", "tales"),
    ):
        complete(server, prompt, name, cache_salt=salt)
    prefixes = {
        name: choices(server, name)[0]["prefix"] for name in ("cold", "warm", "other-end", "other-salt", "short")
    }
    assert {name: prefix["result"] for name, prefix in prefixes.items()} == {
        "cold": "new",
        "warm": "found",
        "other-end": "diverged",
        "other-salt": "other_salt",
        "short": "too_short",
    }
    assert prefixes["warm"]["num_cached_tokens"] == prefixes["warm"]["num_reusable_tokens"] >= 32
    other_end = prefixes["other-end"]
    token_ids = server.answer("/tokenize", {"prompt": STORY[:300] + "But the queen was never seen again. " * 4})[
        "tokens"
    ]
    told = server.answer("/tokenize", {"prompt": STORY})["tokens"]
    position = next(index for index, pair in enumerate(zip(token_ids, told, strict=False)) if pair[0] != pair[1])
    assert (other_end["position"], other_end["token_id"]) == (position, token_ids[position])
    assert 0 < other_end["num_cached_tokens"] <= position


def find_preempted(server: ServerProcess) -> dict[str, Any] | None:
    """Run two requests that have too few blocks, and return a choice that has been seen waiting for blocks."""
    waiting = None
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(complete, server, "Light", name, max_tokens=480) for name in ("first", "second")]
        while not all(answer.done() for answer in answers):
            for choice in read(server, "requests")["data"]:
                check_sums(choice)
                assert (choice["num_blocks"] > 0) == (choice["state"] == "running"), choice
                if choice["state"] == "waiting" and choice["num_preemptions"]:
                    waiting = choice
        for answer in answers:
            answer.result()
    return waiting


def test_living_requests(start_server: StartServer) -> None:
    """One runs and one waits; then one has been preempted, and its stages still add up."""
    server = start_server("--max-model-len=512", kv_cache_flag(12), "--speculative=off")
    waiting = next(filter(None, (find_preempted(server) for _ in range(5))))  # it waits for some seconds only
    assert waiting["num_preemptions"] >= 1
    assert waiting["seconds"]["preempted"] > 0
    (ended,) = choices(server, waiting["other_ids"][0])
    check_sums(ended)
    assert ended["preemptions"][0]["resumed"] > ended["preemptions"][0]["at"]
    trace = read(server, f"requests/{waiting['other_ids'][0]}/trace")
    check_trace(trace)
    preempted = slices_named(trace, "preempted")
    assert len(preempted) == ended["num_preemptions"]
    assert sum(event["dur"] for event in preempted) == pytest.approx(1e6 * ended["seconds"]["preempted"], abs=100)


def test_the_queue(start_server: StartServer) -> None:
    server = start_server("--max-num-seqs=1")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(complete, server, "Light", f"q{number}", max_tokens=300) for number in range(3)]
        wait_until(lambda: read(server, "queue")["num_waiting"] == 2, 60)
        waiting = read(server, "queue")["data"]
        for answer in answers:
            answer.result()
    assert [choice["num_ahead"] for choice in waiting] == list(range(len(waiting)))
    assert all(choice["waited"] > 0 and not choice["was_preempted"] for choice in waiting)
    assert read(server, "queue") == {"object": "list", "num_waiting": 0, "data": []}


def test_the_blocks(start_server: StartServer) -> None:
    """Two choices of one prompt share its blocks; when they have ended, the blocks are cached."""
    server = start_server("--speculative=off")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, server, STORY, "blocks", n=2, max_tokens=300)
        wait_until(lambda: len(read(server, "requests?state=running")["data"]) == 2, 60)
        blocks = read(server, "blocks")
        id = answer.result()["id"]
    assert {(owner["id"], owner["index"]) for owner in blocks["owners"]} == {(id, 0), (id, 1)}
    shared = [run for run in blocks["data"] if run["num_holders"] == 2]
    num_full = choices(server, "blocks")[0]["num_prompt_tokens"] // blocks["block_size"]
    assert num_full - 1 <= sum(run["num_blocks"] for run in shared) <= num_full
    assert all(run["is_cached"] for run in shared)
    held = sum(run["num_blocks"] for run in blocks["data"] if run["state"] == "held")
    assert held == blocks["num_used"] > num_full
    assert sum(run["num_blocks"] for run in blocks["data"]) == min(blocks["num_blocks"], 1 << 14)
    after = read(server, "blocks")
    assert after["num_used"] == 0
    assert {run["state"] for run in after["data"]} <= {"cached", "free", "unused"}
    assert sum(run["num_blocks"] for run in after["data"] if run["state"] == "cached") >= num_full


def test_with_keys(start_server: StartServer) -> None:
    """Clients see themselves; token ids are not kept, so why a prefix was not found is not compared."""
    server = start_server("--api-key=a", "--api-key=b", "--admin-key=root")
    for key, name in (("a", "of-a"), ("b", "of-b")):
        headers = {"authorization": f"Bearer {key}", "x-request-id": name}
        body = {"prompt": STORY, "max_tokens": 3}
        assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 200
    for key, names, keys in (
        ("a", ["of-a"], {"key-1", None}),
        ("b", ["of-b"], {"key-2", None}),
        ("root", ["of-b", "of-a"], {"key-1", "key-2"}),
    ):
        listed = read(server, "requests", authorization=f"Bearer {key}")["data"]
        assert [choice["other_ids"][0] for choice in listed] == names
        rows = [row for step in read(server, "steps", authorization=f"Bearer {key}")["data"] for row in step["rows"]]
        assert {row["key"] for row in rows} == keys
    (own,) = choices(server, "of-b", authorization="Bearer b")
    assert own["prefix"]["result"] == "not_found"
    assert own["prefix"]["token_id"] is None
    assert server.get("/lightwell/v1/requests/of-a", authorization="Bearer b").status_code == 404
    assert httpx.get(f"{server.url}/lightwell/v1/requests").status_code == 401


def test_the_stream_of_steps_misses_none(start_server: StartServer) -> None:
    server = start_server()
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
    assert steps == list(range(1, len(steps) + 1))


def inspect(server: ServerProcess, **body: Any) -> dict[str, Any]:
    response = server.http.post("/lightwell/v1/inspect", json=body, timeout=120)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def test_inside_the_model(server: ServerProcess) -> None:
    """What was sent is computed again, token by token, while other requests run."""
    chat = {
        "model": "default",
        "messages": [{"role": "user", "content": "Name a city, its country and its river."}],
        "max_tokens": 40,
        "seed": 3,
        "temperature": 0.8,
        "top_p": 0.95,
        "response_format": {"type": "json_object"},
    }
    chat["model"] = server.get("/v1/models").json()["data"][0]["id"]
    story = {"max_tokens": 40, "temperature": 1.1, "min_p": 0.02, "repetition_penalty": 1.1, "seed": 4, "n": 2}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        response = server.http.post("/v1/chat/completions", json=chat, headers={"x-request-id": "as-json"})
        assert response.status_code == 200, response.text
        complete(server, STORY, "a-story", **story)
        others = [pool.submit(complete, server, STORY, f"beside-{number}", max_tokens=200) for number in range(3)]
        for name, index in (("as-json", 0), ("a-story", 0), ("a-story", 1)):
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
            assert other.result()["usage"]["completion_tokens"] == 200


def test_a_prompt_inside_the_model(server: ServerProcess) -> None:
    answer = inspect(server, prompt="The capital of France is", layer=0, head=0)
    assert "".join(token["token"] for token in answer["tokens"]) == "The capital of France is"
    assert answer["positions"][-1]["layers"][-1]["lens"][0]["token"] == " Paris"
    for position, row in zip(answer["positions"], answer["attention"]["rows"], strict=True):
        assert len(row) == position["position"] + 1
        assert sum(row) == pytest.approx(1, abs=1e-4)
