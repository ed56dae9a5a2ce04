"""Rates against a plain model, the format of durations, and what tenants have used."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from server.http.errors import APIError
from server.parts.limits.keys_file import TOKENS, Limits, Rate, format_duration
from server.tenants import DAY, Account
from tests.server.conftest import StartServer
from tests.support.clients import COMPLETIONS, write_keys_file
from tests.support.serving import RunningServer

STEPS = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=20)


@given(per_minute=st.integers(1, 100), steps=STEPS)
def test_a_rate_refills_in_a_minute_and_can_be_overdrawn(per_minute: int, steps: list[tuple[float, int]]) -> None:
    rate, level, now = Rate(TOKENS, per_minute, 0.0), float(per_minute), 0.0
    for seconds, amount in steps:
        now += seconds
        level = min(per_minute, level + seconds * per_minute / 60)
        assert rate.level(now) == pytest.approx(level)
        assert rate.level(now - 50.0) == pytest.approx(level)  # a clock that is set back
        rate.take(amount, now)
        level -= amount
        assert rate.seconds_until(1, now) == pytest.approx(max(0.0, 1 - level) * 60 / per_minute)


def test_durations() -> None:
    texts = {0: "0ms", 0.0001: "1ms", 0.12: "120ms", 1: "1s", 7.66: "7.66s", 360: "6m0s", 3661.5: "61m1.5s"}
    assert [format_duration(seconds) for seconds in texts] == list(texts.values())


DAYS = [  # of the wall clock, of the monotonic clock, and whether the budget is there again
    (-1, 0, False),  # the clock is set back
    (1, 0, True),
    (300, 0, True),  # it is ahead for a while, which holds up the budget for a day at most
    (1, 0.1, False),
    (1.9, 0.9, False),
    (2.0, 1.0, True),
    (2.2, 1.2, False),
    (3.0, 2.0, True),  # the days are those of the right clock again
]


def test_a_budget_is_renewed_once_a_day() -> None:
    start, noon = 1000.0, 20_000.5 * DAY
    now, wall = start, noon
    account = Account(lambda: now, lambda: wall)
    account.rules = Limits(tokens_per_day=10).rules(account)
    account.count_tokens(prompt=9)
    account.begin()
    account.count_tokens(output=1)
    for wall_days, days, is_renewed in DAYS:
        wall, now = noon + wall_days * DAY, start + days * DAY
        with nullcontext() if is_renewed else pytest.raises(APIError, match="10 tokens per day"):
            account.begin()
        account.count_tokens(prompt=10 if is_renewed else 0)


# What tenants have used.


def complete(server: RunningServer, key: str = "none", **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "abcd", "max_tokens": 2, **fields}
    return httpx.post(server.url + COMPLETIONS, json=body, headers={"authorization": f"Bearer {key}"})


def usage(server: RunningServer, key: str = "none") -> dict[str, Any]:
    (entry,) = httpx.get(server.url + "/v1/usage", headers={"authorization": f"Bearer {key}"}).json()["data"]
    return dict(entry)


def test_usage_of_each_tenant(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(api_keys_file=str(write_keys_file(tmp_path, tokens_per_day=99)))
    for key in ("a", "a", "b", "none"):
        complete(server, key)
    for tenant, key, num_requests in (("alice", "a", 2), ("bob", "b", 1)):
        for name, count in (("requests", 1), ("prompt_tokens", 4), ("generation_tokens", 2)):
            assert server.metric(f"lightwell_tenant_{name}_total", tenant=tenant) == count * num_requests
        own = usage(server, key)
        assert (own["name"], own["num_requests"], own["total_tokens_today"]) == (tenant, num_requests, 6 * num_requests)
        assert own["limits"]["tokens_per_day"] == (99 if key == "a" else None)


def test_usage_without_keys_is_that_of_all(start_server: StartServer) -> None:
    server = start_server()
    assert complete(server, priority=-9).headers.get("x-lightwell-warnings") is None
    assert usage(server) | {"limits": None} == {
        **{"object": "usage", "name": None, "num_requests": 1, "num_running_requests": 0, "limits": None},
        **{"prompt_tokens": 4, "cached_tokens": 0, "completion_tokens": 2, "total_tokens_today": 6},
    }
    assert b"tenant=" not in generate_latest(server.context.metrics.registry)


def test_an_admin_sees_all(start_server: StartServer) -> None:
    server = start_server(api_key=("a", "b"), admin_key="root")
    complete(server, "a")
    answer = httpx.get(server.url + "/v1/usage", headers={"authorization": "Bearer root"}).json()
    assert {entry["name"]: entry["num_requests"] for entry in answer["data"]} == {"key-1": 1, "key-2": 0, "admin": 0}
    assert usage(server, "b")["name"] == "key-2"
