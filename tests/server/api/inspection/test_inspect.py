"""`POST /lightwell/v1/inspect` over real sockets, with a fake engine. What it shows is tested with the real one."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.shared.records import InspectionProblem
from server.api.inspection.inspect import MAX_POSITIONS
from tests.server.api.inspection.test_routes import start, streams
from tests.server.conftest import StartServer
from tests.support.clients import write_keys_file
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error

__all__ = ["streams"]


@pytest.fixture(autouse=True)
def _endless(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.01


def ask(server: RunningServer, key: str = "", **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{server.url}/lightwell/v1/inspect", json=body, headers=headers, timeout=20)


def test_a_prompt(server: RunningServer) -> None:
    response = ask(server, prompt="ab", layer=1, head=0)
    assert response.status_code == 200, response.text
    lens = [{"token_id": 97, "token": "a", "logprob": -0.5}]
    norms = {"residual_norm": 1.0, "attention_norm": 2.0, "mlp_norm": 3.0}
    layer = {"lens": lens, **norms, "heads": [[[0, 0.75]]], "experts": None}
    assert response.json() == {
        **{"id": None, "model": "tiny", "num_layers": 2, "num_heads": 1, "num_experts": 0},
        **{"num_prompt_tokens": 2, "num_tokens": 2, "start": 1, "end": 2},
        "tokens": [{"token_id": 97, "token": "a"}, {"token_id": 98, "token": "b"}],
        "positions": [{"position": 1, "layers": [layer, layer], "next": None, "recomputed": None, "is_equal": None}],
        "attention": {"layer": 1, "head": 0, "rows": [[0.75, 0.25]]},
        **{"sampling": None, "is_equal": None},
    }
    assert ask(server, prompt=[97, 98]).json()["tokens"] == response.json()["tokens"]


def test_a_request(server: RunningServer, streams: list[httpx.Response]) -> None:
    start(server, streams, "mine", prompt="ab")
    body = ask(server, id="mine").json()
    assert body["id"].startswith("cmpl-")
    (position,) = body["positions"]
    b = {"token_id": 98, "token": "b"}
    assert (position["next"], position["recomputed"], position["is_equal"], body["is_equal"]) == (b, b, True, True)
    assert body["attention"] is None
    a = {"token_id": 97, "token": "a", "logprob": -0.5}
    logits = {"name": "logits", "num_tokens": 3, "num_removed": 0, "top": [a], "removed": []}
    top_k = {"name": "top_k", "num_tokens": 1, "num_removed": 2, "top": [b | {"logprob": 0.0}], "removed": [a]}
    noise = [b | {"logit": 1.5, "noise": 0.5}]
    assert body["sampling"] == {
        **{"position": 1, "stages": [logits, top_k], "noise": noise, "recomputed": b, "sent": b},
    }


@pytest.mark.parametrize(
    ("problem", "status", "code"),
    [
        (InspectionProblem.BUSY, 429, "rate_limit_exceeded"),
        (InspectionProblem.NO_BLOCKS, 503, "overloaded"),
        (InspectionProblem.NO_ADAPTER, 404, "adapter_not_loaded"),
        (InspectionProblem.NOT_FOUND, 404, "request_not_found"),
        (InspectionProblem.NOT_KEPT, 404, "tokens_not_kept"),
        (InspectionProblem.OUT_OF_RANGE, 400, "invalid_value"),
        (InspectionProblem.TOO_LONG, 400, "invalid_value"),
        (InspectionProblem.TOO_SLOW, 503, "overloaded"),
    ],
)
def test_problems(
    server: RunningServer, fake_engine: FakeEngine, problem: InspectionProblem, status: int, code: str
) -> None:
    fake_engine.config.inspection_problem = problem
    response = ask(server, id="a")
    assert check_error(response, status)["code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_the_range_is_named(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.inspection_problem = InspectionProblem.OUT_OF_RANGE
    message = check_error(ask(server, id="a", end=9), 400)["message"]
    assert "of 3 positions, expected 0 <= start < end <= 3" in message
    assert f"at most {MAX_POSITIONS} positions" in message


def test_keys(keyed: RunningServer, streams: list[httpx.Response]) -> None:
    keyed.engine.config.endless, keyed.engine.config.step_seconds = True, 0.01
    start(keyed, streams, "mine", "key-a")
    for key, status in (("", 401), ("key-b", 404), ("key-a", 200), ("root", 200)):
        assert ask(keyed, key, id="mine").status_code == status


def test_positions_count_as_prompt_tokens(
    start_server: StartServer, streams: list[httpx.Response], tmp_path: Path
) -> None:
    server = start_server(api_keys_file=str(write_keys_file(tmp_path, tokens_per_day=8)))

    def usage(key: str) -> int:
        (own,) = httpx.get(server.url + "/v1/usage", headers={"authorization": f"Bearer {key}"}).json()["data"]
        tokens: int = own["prompt_tokens"]
        return tokens

    assert ask(server, "a", prompt="abcd", end=2).status_code == 200
    assert usage("a") == 2
    assert ask(server, "a", prompt="abcd").status_code == 200
    assert usage("a") == 6
    for problem in (InspectionProblem.BUSY, InspectionProblem.TOO_SLOW):
        server.engine.config.inspection_problem = problem
        ask(server, "a", prompt="abcd")
    assert usage("a") == 10  # what is refused costs nothing
    assert check_error(ask(server, "a", prompt="abcd"), 429)["code"] == "insufficient_quota"
    server.engine.config.inspection_problem = None
    start(server, streams, "mine", "b")
    before = usage("b")
    end = ask(server, "b", id="mine").json()["end"]
    assert usage("b") - before == end > 0


def test_a_prompt_longer_than_the_context(server: RunningServer, fake_engine: FakeEngine) -> None:
    too_long = fake_engine.config.max_model_len + 1
    assert check_error(ask(server, prompt=[97] * too_long), 400)["code"] == "context_length_exceeded"
    error = check_error(ask(server, prompt="a" * 1_000_000), 400)
    assert " at least " in error["message"]  # it was not tokenized
