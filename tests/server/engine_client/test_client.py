"""Tests of `EngineClient` and its metrics with a fake engine."""

import pytest

from server.http.errors import InvalidValueError
from server.metrics import Metrics
from tests.support.engine_clients import PROMPT, read, ready, request, until
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


async def test_metrics_follow_events(fake_engine: FakeEngine) -> None:
    metrics = Metrics("lightwell_", "m")
    labels = {"model_name": "m", "engine": "0"}

    def value(name: str, **more: str) -> float:
        return metrics.registry.get_sample_value(f"lightwell_{name}", labels | more) or 0.0

    fake_engine.config.num_cached_tokens = 1
    async with ready(fake_engine.config.address, metrics=metrics) as client:
        await read(client.submit(request("a", n=2)))
        num_tokens = len(fake_engine.config.reply) + 1
        assert value("request_success_total", finished_reason="stop") == 2
        assert value("time_to_first_token_seconds_count") == 2
        assert value("inter_token_latency_seconds_count") == 2 * (num_tokens - 1)
        assert value("request_generation_tokens_sum") == 2 * num_tokens
        assert value("request_prompt_tokens_sum") == 2 * len(PROMPT)
        assert value("request_prefill_kv_computed_tokens_sum") == 2 * (len(PROMPT) - 1)
        assert value("request_params_n_sum") == 2
        assert value("request_params_n_count") == 1
        assert value("request_params_max_tokens_sum") == 200
        assert value("request_max_num_generation_tokens_sum") == num_tokens
        assert value("request_queue_time_seconds_count") == 2
        assert value("request_decode_time_seconds_count") == 2
        assert value("iteration_tokens_total_sum") == 2 * num_tokens
        assert value("generation_tokens_total") == 2 * num_tokens
        fake_engine.pause()
        stream = client.submit(request("b"))
        await until(lambda: value("num_requests_waiting") == 1)
        await stream.aclose()
        await until(lambda: value("num_requests_waiting") == 0)
        assert value("request_success_total", finished_reason="abort") == 1
        with pytest.raises(InvalidValueError):
            client.reserve(1000)
        assert value("requests_rejected_total", reason="too_many_choices") == 1
