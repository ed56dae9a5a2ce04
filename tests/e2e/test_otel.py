"""Spans of a real server with a real model: they agree with what else is told of the same requests."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import StartServer
from tests.support.kv_cache_memory import kv_cache_flag
from tests.support.otlp_receiver import OTLPReceiver, attributes, seconds
from tests.support.serving import wait_until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STAGES = ("tokenizing", "queue", "prefill", "decode", "preempted")
TOLERANCE = 0.001  # seconds; the offset between the clocks is measured twice


@pytest.fixture
def receiver() -> Iterator[OTLPReceiver]:
    with OTLPReceiver() as receiver:
        yield receiver


def test_spans_agree_with_explain_and_the_records(start_server: StartServer, receiver: OTLPReceiver) -> None:
    server = start_server(f"--otlp-endpoint={receiver.url}", OTEL_BSP_SCHEDULE_DELAY="50", OTEL_SERVICE_NAME="mine")
    body = {"prompt": "Once upon a time", "max_tokens": 24, "ignore_eos": True, "lightwell": {"explain": True}}
    answer = server.http.post("/v1/completions", json=body, headers={"traceparent": PARENT}).json()
    (root,) = receiver.wait_for_roots()
    assert receiver.resource["service.name"] == "mine"
    assert root.trace_id.hex() == PARENT.split("-")[1]
    found = attributes(root.attributes)
    assert found["gen_ai.response.id"] == answer["id"]
    assert found["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == 24
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    (choice,) = server.get(f"/lightwell/v1/requests/{answer['id']}").json()["choices"]
    stages = {child.name: seconds(child) for child in receiver.children(root)}
    assert sum(stages.values()) == pytest.approx(seconds(root), abs=1e-6)
    assert stages == pytest.approx(
        {name: choice["seconds"][name] for name in STAGES if choice["seconds"][name]} | {"writing": stages["writing"]},
        abs=TOLERANCE,
    )
    explained = answer["lightwell"]["seconds"]
    for name in ("prefill", "decode"):
        assert stages[name] == pytest.approx(explained[name], abs=TOLERANCE)
    assert 1e-9 * root.start_time_unix_nano == pytest.approx(choice["arrival"], abs=0.1)
    assert seconds(root) >= answer["lightwell"]["wall_s"] - TOLERANCE
    first_token = stages["tokenizing"] + stages["queue"] + stages["prefill"]
    assert found["gen_ai.server.time_to_first_token"] == pytest.approx(first_token, abs=1e-6)


def test_a_preempted_request(start_server: StartServer, receiver: OTLPReceiver) -> None:
    """Its stages come again after each preemption. The last spans arrive although the server is stopped."""
    endpoint = f"--otlp-endpoint={receiver.url}"
    flags = ("--max-model-len=512", kv_cache_flag(12), "--speculative=off", endpoint)
    server = start_server(*flags, OTEL_BSP_SCHEDULE_DELAY="600000")
    body = {"prompt": "Light", "max_tokens": 480, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: server.answer("/v1/completions", body), range(2)))
    assert receiver.requests == []
    server.signal(signal.SIGTERM)
    roots = receiver.wait_for_roots(2)
    wait_until(lambda: server.process.poll() is not None, 60)
    assert server.process.returncode == 0
    num_preemptions = [attributes(root.attributes)["lightwell.num_preemptions"] for root in roots]
    assert sorted(num_preemptions) == [0, 1]
    for root, count in zip(roots, num_preemptions, strict=True):
        names = [child.name for child in receiver.children(root)]
        assert names.count("preempted") == count
        assert names.count("decode") == count + 1
        assert sum(map(seconds, receiver.children(root))) == pytest.approx(seconds(root), abs=1e-6)


def test_packages_that_are_missing(tmp_path: Path) -> None:
    """The server says at once what to install. An empty package hides the one that is installed."""
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").touch()
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from server.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", "none.gguf", "--otlp-endpoint=http://127.0.0.1:4318"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode != 0
    assert "--otlp-endpoint needs more packages: pip install 'lightwell[otel]'" in result.stderr
    assert "Traceback" not in result.stderr
