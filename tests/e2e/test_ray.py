"""The application of Ray Serve on a real cluster, with real replicas and a real model."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.ray_cluster import KEY, RayCluster, ray_cluster
from tests.support.server_process import CHAT, MODEL, REQUEST_SECONDS
from tests.support.serving import wait_until

pytestmark = pytest.mark.long

SCALE_SECONDS = 600.0  # bounds hangs only
REPLICA = "x-lightwell-replica"
AUTOSCALING = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay_s": 0.5}
AUTOSCALING |= {"downscale_delay_s": 2, "metrics_interval_s": 0.5, "look_back_period_s": 1}


@pytest.fixture(scope="module")
def cluster(smollm2_path: Path) -> Iterator[RayCluster]:
    with ray_cluster() as cluster:
        cluster.deploy(smollm2_path, {"num_replicas": 2})
        yield cluster


@pytest.fixture(scope="module")
def http(cluster: RayCluster) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=cluster.url, headers=headers, timeout=REQUEST_SECONDS, trust_env=False) as http:
        yield http


def body(text: str, num_tokens: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": num_tokens, "seed": 1, "ignore_eos": True, **fields}


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    """Return the sum of the samples of a metric that have these labels."""
    page = http.get("/metrics").raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


def stream(
    http: httpx.Client, text: str, num_tokens: int, replica: str = "", on_start: Callable[[], object] = lambda: None
) -> list[Any]:
    """Return the events of a stream. `on_start` is called at the first one."""
    events: list[Any] = []
    headers = {REPLICA: replica}
    with http.stream("POST", CHAT, json=body(text, num_tokens, stream=True), headers=headers) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 1:
                    on_start()
    return events


def test_a_stream_ends_in_the_engine_when_its_client_disconnects(http: httpx.Client) -> None:
    def num_aborts() -> float:
        return metric(http, "lightwell_request_success_total", finished_reason="abort")

    before = num_aborts()
    with http.stream("POST", CHAT, json=body("Count.", 900, stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: metric(http, "lightwell_num_requests_running") == 1, REQUEST_SECONDS)
    wait_until(lambda: metric(http, "lightwell_num_requests_running") == 0, REQUEST_SECONDS)
    wait_until(lambda: num_aborts() == before + 1, REQUEST_SECONDS)


def test_a_replica_that_is_killed_ends_its_streams_only(cluster: RayCluster, http: httpx.Client) -> None:
    before = cluster.replicas()
    victim, other = before
    all_have_begun = threading.Barrier(9)

    def run(number: int) -> dict[str, Any]:
        replica = (victim, other)[number % 2]
        events = stream(http, f"Tell me story {number}.", 400, replica, lambda: all_have_begun.wait(REQUEST_SECONDS))
        last: dict[str, Any] = events[-1]
        return last

    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(run, number) for number in range(8)]
        all_have_begun.wait(REQUEST_SECONDS)
        os.kill(before[victim], signal.SIGKILL)
        assert all("died" in end.result()["error"]["message"] for end in ends[::2])
        assert {end.result()["choices"][0]["finish_reason"] for end in ends[1::2]} == {"length"}
    wait_until(lambda: len(cluster.replicas()) == 2 and victim not in cluster.replicas(), SCALE_SECONDS)
    assert all(http.post(CHAT, json=body(f"Question {number}", 4)).status_code == 200 for number in range(8))


def test_no_request_fails_while_replicas_are_added_and_removed(
    cluster: RayCluster, http: httpx.Client, smollm2_path: Path
) -> None:
    cluster.deploy(smollm2_path, {"autoscaling_config": AUTOSCALING, "num_replicas": "auto"})
    wait_until(lambda: len(cluster.replicas()) == 1, SCALE_SECONDS)
    reasons: list[str] = []
    num_clients = 8

    def chat(client: int) -> None:
        turn = 0
        while client < num_clients:
            events = stream(http, f"Client {client}, question {turn}.", 48)
            reasons.append(events[-1]["choices"][0]["finish_reason"] if events[-1].get("choices") else str(events[-1]))
            turn += 1

    with ThreadPoolExecutor(num_clients) as pool:
        chats = [pool.submit(chat, client) for client in range(num_clients)]
        try:
            wait_until(lambda: len(cluster.replicas()) == 3, SCALE_SECONDS)
            num_clients = 1
            wait_until(lambda: len(cluster.replicas()) == 1, SCALE_SECONDS)
            num_answers = len(reasons)
            wait_until(lambda: len(reasons) > num_answers + 3)
        finally:
            num_clients = 0
        for each in chats:
            each.result()
    assert set(reasons) == {"length"}
